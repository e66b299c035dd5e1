"""The page: which components there are, how they look, and which handler each event calls."""
from pathlib import Path
from typing import List

import gradio as gr
import handlers
from answers import BY_BUDGET, BY_CONFIDENCE
from handlers import CONFIDENCE
from served import display_name

STYLE = Path(__file__).resolve().parent / 'style.css'
# The region stays in the page and only its text changes; screen readers announce nothing else.
_SAY = """
const say = () => { element.querySelector('[role=status]').textContent = props.value || ''; };
say();
watch('value', say);"""
_CHOOSE = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('button[data-index]');
  if (!card) return;
  element.querySelectorAll('button').forEach(b => b.setAttribute('aria-pressed', String(b === card)));
  window.choices = (window.choices || 0) + 1;
  trigger('click', {index: Number(card.dataset.index), order: window.choices});
});"""
_HEAD = """
<div class="mx head"><h1>See a network make up its mind</h1>
<p>A multi-exit network can answer before it is finished. Each exit is cheaper than the next and a little less often
right: a budget, or how sure it is, decides where an image leaves.</p></div>"""


def any_file(**kwargs) -> gr.Image:
    """An image field that hands on the file as it came: `read_image` says what is wrong with it, if anything."""
    image = gr.Image(type='filepath', **kwargs)
    decode = image.preprocess
    # Not a subclass: gradio writes a stub file beside every module that has one.
    image.preprocess = lambda payload: str(payload.path) if payload is not None and payload.path else decode(payload)
    return image


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system, so that nothing is fetched, and the colours of style.css."""
    fonts = [gr.themes.Font(name) for name in ('ui-sans-serif', 'system-ui', 'Segoe UI', 'Roboto', 'sans-serif')]
    mono = [gr.themes.Font(name) for name in ('ui-monospace', 'monospace')]
    return gr.themes.Base(
        primary_hue='orange', neutral_hue='slate', radius_size='lg', font=fonts, font_mono=mono,
    ).set(
        body_background_fill='#f5f3ee', body_background_fill_dark='#101319',
        block_background_fill='#ffffff', block_background_fill_dark='#191d26',
        block_border_width='0px', slider_color='#c2470a', slider_color_dark='#ff9a55',
        block_label_text_color='#566074', block_label_text_color_dark='#a3abbb')


def _status() -> gr.HTML:
    return gr.HTML(
        html_template='<div role="status" aria-live="polite" class="unseen"></div>', js_on_load=_SAY,
        elem_classes='mx-status', apply_default_css=False)


def _picture(**kwargs) -> gr.HTML:
    return gr.HTML(js_on_load=kwargs.pop('js_on_load', None), apply_default_css=False, **kwargs)


def build_page(names: List[str]) -> gr.Blocks:
    """The page for some networks, the first of which is shown at the start.

    Events that only read again go past the queue: they take milliseconds and must not wait for anyone's model.
    """
    again = dict(queue=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private')
    with gr.Blocks(title='See a network make up its mind') as page:
        reading = gr.State()
        choices = gr.State(0)  # the number of the card's choice that was answered last
        with gr.Row(elem_classes='mx-top'):
            with gr.Column(scale=3, min_width=320):
                _picture(value=_HEAD)
            with gr.Column(scale=1, min_width=340):
                network = gr.Dropdown([(display_name(n), n) for n in names], value=names[0], label='Network')
        with gr.Tabs():
            with gr.Tab('One image', id='image'), gr.Row():
                with gr.Column(scale=1, min_width=310):
                    cards = _picture(js_on_load=_CHOOSE, elem_id='cards')
                    with gr.Accordion('Upload, paste or photograph your own', open=False, elem_id='own'):
                        image = any_file(
                            sources=['upload', 'clipboard', 'webcam'], label='Your image', height=220,
                            elem_id='image')
                with gr.Column(scale=3, min_width=320):
                    with gr.Column(elem_classes='mx-controls'):
                        with gr.Row():
                            mode = gr.Radio(
                                [('at a budget', BY_BUDGET), ('when sure enough', BY_CONFIDENCE)], value=BY_BUDGET,
                                label='Stop', elem_id='mode', scale=3, min_width=270)
                            calibrated = gr.Checkbox(
                                True, label='calibrated probabilities', elem_id='calibrated', scale=2, min_width=210)
                        budget = gr.Slider(
                            0, 100, 50, label='Budget for this image (million MACs)', buttons=[], elem_id='budget')
                        ruler = _picture(elem_classes='mx-ruler')
                        confidence = gr.Slider(
                            0.2, 1., CONFIDENCE, step=0.01, label='Stop at the first exit this sure', buttons=[],
                            visible=False, elem_id='confidence')
                    view = _picture(elem_id='view')
                    said = _status()
            with gr.Tab('A whole data set', id='data'):
                with gr.Column(elem_classes='mx-controls'):
                    average = gr.Slider(
                        0, 100, 50, label='Average budget per image (million MACs)', buttons=[], elem_id='average')
                    average_ruler = _picture(elem_classes='mx-ruler')
                sprite = _picture(elem_classes='mx-sprite')
                data_view = _picture(elem_id='data-view')
                data_said = _status()
                scaled = gr.Checkbox(
                    True, label='calibrate: divide the logits by the stored temperatures', elem_id='scaled',
                    elem_classes='mx-plain')
                diagrams = _picture(elem_id='diagrams')

        controls = [reading, mode, budget, confidence, calibrated]
        everything = [
            network, reading, cards, mode, budget, ruler, confidence, average, average_ruler, data_view, sprite,
            diagrams, scaled, image]
        quiet = dict(show_progress='hidden', api_visibility='private')
        read_again = dict(fn=handlers.reread, inputs=controls, outputs=[view, said], **again)

        def open_page(request: gr.Request):
            return handlers.open_page(names, dict(request.query_params))

        page.load(open_page, None, everything, **quiet).success(**read_again)
        # A choice while the one before is being answered would be dropped by default. The last one counts; of clicks
        # all are sent, since one that waited would have forgotten its card, and numbered: on a busy machine the second
        # can come first.
        network.input(
            handlers.open_network, network, everything, trigger_mode='always_last', **quiet).success(**read_again)
        cards.click(
            handlers.choose_example, [network, choices], [reading, choices], trigger_mode='multiple',
            **quiet).success(**read_again)
        image.input(
            handlers.choose_file, [network, image], [reading, cards], trigger_mode='always_last',
            **quiet).success(**read_again)
        mode.input(handlers.switch_mode, mode, [budget, ruler, confidence], **again)
        for control in (mode, budget, confidence, calibrated):
            control.input(**read_again)
        average.input(handlers.budget_page, [network, average], [data_view, data_said], **again)
        scaled.input(handlers.reliability, [network, scaled], diagrams, **again)
        _add_api(names)
    return page


def _add_api(names: List[str]) -> None:
    """Endpoints for programs, which keep no state; `classify` needs components, since it takes a file."""
    with gr.Row(visible=False):
        inputs = [
            any_file(label='image'),
            gr.Dropdown(names, value=names[0], label='network'),
            gr.Textbox('', label='budget'),
            gr.Number(None, label='confidence'),
            gr.Checkbox(True, label='calibrated')]
        gr.Button('classify').click(
            handlers.classify, inputs, gr.JSON(label='answer'), api_name='classify', concurrency_limit=4)

    def networks() -> List[str]:
        """Lists the networks with trained weights."""
        return names

    gr.api(networks, api_name='networks')
    gr.api(handlers.policy, api_name='policy')
