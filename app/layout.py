"""The page: its components, their look, and the handler of each event."""
from functools import partial
from pathlib import Path
from typing import List

import gradio as gr
import handlers
from answers import BY_BUDGET, BY_CONFIDENCE, BY_LOSS, BY_TIME
from handlers import CONFIDENCE
from served import display_name

STYLE = Path(__file__).resolve().parent / 'style.css'
# Screen readers announce a live region only if its element stays and its text changes.
_ANNOUNCE = """
const announce = () => { element.querySelector('[role=status]').textContent = props.value || ''; };
announce();
watch('value', announce);"""
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
<p>A multi-exit network has classifiers along its depth. Early exits cost less and are slightly less accurate;
a compute budget or a confidence threshold decides which exit answers.</p></div>"""


def any_file(**kwargs) -> gr.Image:
    """An image field that passes on the uploaded file unchanged, for `read_image` to check."""
    image = gr.Image(type='filepath', **kwargs)
    decode = image.preprocess
    # Not a subclass: gradio writes a stub file beside every module that has one.
    image.preprocess = lambda payload: str(payload.path) if payload is not None and payload.path else decode(payload)
    return image


def theme() -> gr.themes.Base:
    """System fonts, so that nothing is fetched, and the colours of style.css."""
    fonts = [gr.themes.Font(name) for name in ('ui-sans-serif', 'system-ui', 'Segoe UI', 'Roboto', 'sans-serif')]
    mono = [gr.themes.Font(name) for name in ('ui-monospace', 'monospace')]
    return gr.themes.Base(
        primary_hue='orange', neutral_hue='slate', radius_size='lg', font=fonts, font_mono=mono,
    ).set(
        body_background_fill='#f5f3ee', body_background_fill_dark='#101319',
        block_background_fill='#ffffff', block_background_fill_dark='#191d26',
        block_border_width='0px', slider_color='#c2470a', slider_color_dark='#ff9a55',
        block_label_text_color='#566074', block_label_text_color_dark='#a3abbb')


_picture = partial(gr.HTML, js_on_load=None, apply_default_css=False)
_status = partial(
    _picture, html_template='<div role="status" aria-live="polite" class="unseen"></div>', js_on_load=_ANNOUNCE,
    elem_classes='mx-status')


def build_page(names: List[str]) -> gr.Blocks:
    """The page for the given networks; it opens with the first.

    Events that run no model bypass the queue: they take milliseconds and must not wait for other visitors.
    """
    again = dict(queue=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private')
    hour = 3600  # uploads older than that are deleted
    with gr.Blocks(title='See a network make up its mind', delete_cache=(hour, hour)) as page:
        outputs = gr.State()
        sent = gr.State()  # outputs of the visitor's own image
        choices = gr.State(0)  # number of the card choice that was answered last
        with gr.Row(elem_classes='mx-top'):
            with gr.Column(scale=3, min_width=320):
                _picture(value=_HEAD)
            with gr.Column(scale=1, min_width=340):
                network = gr.Dropdown([(display_name(n), n) for n in names], value=names[0], label='Network')
        with gr.Tabs():
            with gr.Tab('One image', id='image'), gr.Row():
                with gr.Column(scale=1, min_width=310):
                    cards = _picture(js_on_load=_CHOOSE, elem_id='cards')
                    with gr.Accordion('Upload, paste or take a photo', open=False, elem_id='own'):
                        image = any_file(
                            sources=['upload', 'clipboard', 'webcam'], label='Your image', height=220,
                            elem_id='image')
                with gr.Column(scale=3, min_width=320):
                    with gr.Column(elem_classes='mx-controls'):
                        with gr.Row():
                            mode = gr.Radio(
                                [('Budget', BY_BUDGET), ('Time', BY_TIME), ('Confidence', BY_CONFIDENCE)],
                                value=BY_BUDGET, label='Stop on', elem_id='mode', scale=3, min_width=330)
                            calibrated = gr.Checkbox(
                                True, label='Calibrated probabilities', elem_id='calibrated', scale=2, min_width=210)
                        budget = gr.Slider(
                            0, 100, 50, label='Budget per image (million MACs)', buttons=[], elem_id='budget')
                        ruler = _picture(elem_classes='mx-ruler')
                        time = gr.Slider(
                            0, 10, 5, step=0.01, label='Time per image on this machine (milliseconds)', buttons=[],
                            visible=False, elem_id='time')
                        confidence = gr.Slider(
                            0.2, 1., CONFIDENCE, step=0.01, label='Confidence threshold', buttons=[],
                            visible=False, elem_id='confidence')
                    view = _picture(elem_id='view')
                    status = _status()
            with gr.Tab('Whole dataset', id='data'):
                with gr.Column(elem_classes='mx-controls'):
                    data_mode = gr.Radio(
                        [('Average budget', BY_BUDGET), ('Maximum loss', BY_LOSS)], value=BY_BUDGET, label='Choose by',
                        elem_id='data-mode', visible=False)
                    average = gr.Slider(
                        0, 100, 50, label='Average budget (million MACs per image)', buttons=[], elem_id='average')
                    average_ruler = _picture(elem_classes='mx-ruler')
                    loss = gr.Slider(
                        0.25, 5, 1, step=0.25, label='Maximum accuracy loss (points, with 95% certainty)',
                        buttons=[], visible=False, elem_id='loss')
                sprite = _picture(elem_classes='mx-sprite')
                data_view = _picture(elem_id='data-view')
                data_status = _status()
                scaled = gr.Checkbox(
                    True, label='Apply temperature scaling', elem_id='scaled', elem_classes='mx-plain')
                diagrams = _picture(elem_id='diagrams')

        controls = [outputs, mode, budget, time, confidence, calibrated]
        everything = [
            network, outputs, cards, mode, budget, ruler, time, confidence, calibrated, data_mode, average,
            average_ruler, loss, data_view, data_status, sprite, diagrams, scaled, image]
        quiet = dict(show_progress='hidden', api_visibility='private')
        refresh = dict(fn=handlers.update_view, inputs=controls, outputs=[view, status], **again)

        def open_page(request: gr.Request):
            return handlers.open_page(names, dict(request.query_params))

        page.load(open_page, None, everything, **quiet).success(**refresh)
        # By default gradio drops an event while the one before it runs; here the last choice must win. Clicks are all
        # sent, because a delayed one would lose its card, and numbered, because they can arrive out of order.
        network.input(
            handlers.open_network, network, everything, trigger_mode='always_last', **quiet).success(**refresh)
        cards.click(
            handlers.choose_example, [network, choices], [outputs, choices], trigger_mode='multiple',
            **quiet).success(**refresh)
        image.input(
            handlers.choose_file, [network, image], sent, trigger_mode='always_last', **quiet).success(
                handlers.accept_file, [network, sent], [outputs, cards], **again).success(**refresh)
        mode.input(handlers.switch_mode, mode, [budget, ruler, time, confidence], **again)
        for control in (mode, budget, time, confidence, calibrated):
            control.input(**refresh)
        show_data = dict(
            fn=handlers.data_page, inputs=[network, data_mode, average, loss], outputs=[data_view, data_status],
            **again)
        data_mode.input(handlers.switch_data_mode, data_mode, [average, average_ruler, loss], **again)
        for control in (data_mode, average, loss):
            control.input(**show_data)
        scaled.input(handlers.reliability, [network, scaled], diagrams, **again)
        _add_api(names)
    return page


def _add_api(names: List[str]) -> None:
    """Stateless API endpoints; `classify` needs components because it takes a file."""
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
        """Names of the networks with trained weights."""
        return names

    gr.api(networks, api_name='networks')
    gr.api(handlers.policy, api_name='policy')
