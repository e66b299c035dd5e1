// One image at a time: prepared as in Python, run under the thresholds of the slider's policy, shown.
'use strict';
const $ = (id) => document.getElementById(id);
let about, session, image = null, busy = true, waiting = false;  // busy until the network is loaded

const text = (tag, content, name = '') =>
  Object.assign(document.createElement(tag), {textContent: content, className: name});
const millions = (macs) => `${(macs / 1e6).toFixed(1)}\u00a0M`;
const percent = (p) => `${(100 * p).toFixed(1)}%`;
const spoken = (label) => label.replaceAll('_', ' ');

// Python's round: halves go to the even number.
const even = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// As device.resized: covers the image size over crop_pct, then takes the centre. Images of that size are not resampled,
// so that every pixel is Python's; others are by the canvas, which rounds and filters a little differently than Pillow.
function pixels(bitmap) {
  const {input_size: [, height, width], crop_pct: share} = about.preprocessing;
  let {width: w, height: h} = bitmap;
  if (height === width) {
    const short = Math.floor(height / share);
    [w, h] = w <= h ? [short, Math.floor(short * h / w)] : [Math.floor(short * w / h), short];
  } else {
    const ratio = Math.min(h / Math.floor(height / share), w / Math.floor(width / share));
    [w, h] = [even(w / ratio), even(h / ratio)];
  }
  const canvas = Object.assign(document.createElement('canvas'), {width: w, height: h});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.imageSmoothingQuality = 'high';
  context.fillStyle = 'white';  // behind what is transparent
  context.fillRect(0, 0, w, h);
  context.drawImage(bitmap, 0, 0, w, h);
  return context.getImageData(even((w - width) / 2), even((h - height) / 2), width, height);
}

// float32 (1, C, H, W), with Python's operations in their order.
function normalized(seen) {
  const {input_size: [channels, height, width], mean, std} = about.preprocessing;
  const values = new Float32Array(channels * height * width);
  const f = Math.fround;
  for (let c = 0; c < channels; c++) {
    const low = f(f(mean[c]) * 255), scale = f(1 / f(f(std[c]) * 255));
    for (let i = 0; i < height * width; i++) {
      const [r, g, b] = seen.data.subarray(4 * i, 4 * i + 3);
      const x = channels === 1 ? (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16 : [r, g, b][c];
      values[c * height * width + i] = f(f(x - low) * scale);
    }
  }
  return new ort.Tensor('float32', values, [1, channels, height, width]);
}

function probabilities(logits, temperature) {
  const top = Math.max(...logits);
  const weights = Array.from(logits, (x) => Math.exp((x - top) / temperature));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((x) => x / total);
}

const policy = () => about.policies[Number($('budget').value)];
const thresholds = (p) => new ort.Tensor('float32', Float32Array.from(p.thresholds), [p.thresholds.length]);

function showPolicy() {
  const p = policy();
  const accuracy = p.accuracy === null ? '' : `, expected accuracy ${p.accuracy.toFixed(1)}%`;
  $('policy').textContent = `${millions(p.average_macs)} MACs per image${accuracy}`;
  $('budget').setAttribute('aria-valuetext', $('policy').textContent);
  [...$('exits').children].forEach((exit, k) => {
    exit.querySelector('.share').textContent = `${Math.round(100 * p.exit_shares[k])}%`;
  });
}

// A run that is asked for during another one starts after it, once, with what is chosen then.
async function run() {
  if (!image || busy) {
    waiting = busy;
    return;
  }
  busy = true;
  try {
    const start = performance.now();
    const {logits, exit, confidence} = await session.run({image, thresholds: thresholds(policy())});
    show(logits.data, Number(exit.data[0]) - 1, confidence.data[0], performance.now() - start);
  } finally {
    busy = false;
  }
  if (waiting) {
    waiting = false;
    await run();
  }
}

function show(logits, k, confidence, time) {
  const last = about.exit_macs.length - 1;
  const p = probabilities(logits, about.temperatures[k]);
  const order = [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, 3);
  $('answer').textContent = spoken(about.class_names[order[0]]);
  $('facts').textContent = `exit ${k + 1} of ${last + 1}, confidence ${percent(confidence)}, ` +
    `${millions(about.exit_macs[k])} of ${millions(about.exit_macs[last])} MACs, ${time.toFixed(1)}\u00a0ms`;
  [...$('exits').children].forEach((exit, j) => {
    exit.classList.toggle('ran', j < k);
    exit.classList.toggle('taken', j === k);
  });
  $('classes').replaceChildren(...order.map((i) => {
    const row = text('div', '', 'class'), bar = document.createElement('i');
    bar.style.setProperty('--p', percent(p[i]));
    row.append(text('b', spoken(about.class_names[i])), bar, text('span', percent(p[i])));
    return row;
  }));
  Object.assign($('output').dataset, {
    exit: k + 1, confidence, label: about.class_names[order[0]], runs: Number($('output').dataset.runs || 0) + 1});
}

let chosen = 0;  // a large image must not replace one that was chosen while it was decoded
async function choose(blob, button = null) {
  const mine = ++chosen;
  try {
    const bitmap = await createImageBitmap(await blob, {colorSpaceConversion: 'none'});
    if (mine !== chosen) return;
    const seen = pixels(bitmap);
    Object.assign($('seen'), {width: seen.width, height: seen.height}).getContext('2d').putImageData(seen, 0, 0);
    image = normalized(seen);
    document.querySelectorAll('#samples button').forEach((b) => b.setAttribute('aria-pressed', b === button));
    await run();
  } catch (error) {
    if (mine === chosen) fail(error.name === 'InvalidStateError' ? 'not an image that this browser reads' : error);
  }
}

function fail(reason) {
  $('answer').textContent = 'No answer';
  $('facts').textContent = String(reason);
  $('classes').replaceChildren();
}

async function load(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is missing on the server`);
  return answer;
}

async function start() {
  about = await (await load('page.json')).json();
  document.title = $('name').textContent = about.name;
  about.exit_macs.forEach((macs, k) => {
    const exit = text('li', '');
    exit.append(text('span', k + 1), text('span', '', 'share'));
    exit.title = `${millions(macs)} MACs`;
    $('exits').append(exit);
  });
  $('legend').textContent = 'exits, and the share of held-out images that leaves at each under this budget';
  const [, height, width] = about.preprocessing.input_size;
  $('note').textContent = `Images of ${width} x ${height} pixels give Python's answers; others are resized by ` +
    'the browser, whose pixels differ slightly.';
  $('budget').max = about.policies.length - 1;
  $('budget').value = Math.floor(about.policies.length / 3);
  showPolicy();
  for (const name of about.samples) {
    const button = Object.assign(document.createElement('button'), {type: 'button'});
    const url = `samples/${name}`;
    button.append(Object.assign(new Image(), {src: url, alt: spoken(name.replace(/\.png$/, ''))}));
    button.setAttribute('aria-pressed', false);
    button.onclick = () => choose(load(url).then((answer) => answer.blob()), button);
    $('samples').append(button);
  }
  $('file').onchange = () => {
    if ($('file').files.length) choose($('file').files[0]);
    $('file').value = '';  // the same file may be chosen again
  };
  for (const [event, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
    document.addEventListener(event, (e) => {
      e.preventDefault();
      $('drop').classList.toggle('over', over);
      if (event === 'drop' && e.dataTransfer.files.length) choose(e.dataTransfer.files[0]);
    });
  }
  const at = (name) => new URL(name, document.baseURI).href;
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {mjs: at('ort-wasm.js'), wasm: at('ort-wasm.wasm')};
  session = await ort.InferenceSession.create('network.onnx', {executionProviders: ['wasm']});
  const size = [1, ...about.preprocessing.input_size];  // the first run takes many times longer than all others
  const nothing = new ort.Tensor('float32', new Float32Array(size.reduce((a, b) => a * b)), size);
  await session.run({image: nothing, thresholds: thresholds(about.policies.at(-1))});
  $('budget').disabled = false;
  $('budget').oninput = () => { showPolicy(); run().catch(fail); };
  busy = waiting = false;
  if (image) await run();
  else if (!chosen) $('samples').querySelector('button').click();
}

start().catch(fail);
