"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // The sample's sides, and the training images', which differ on a canvas of another size.
  const { height, width, imageHeight, imageWidth, top, sizes, steps } = data;
  const effective = numbers(data.effective, Float32Array);
  const weights = numbers(data.weights, Float32Array);
  const place = numbers(data.place, Int32Array);
  const pixel = numbers(data.pixel, Int32Array);
  const isCircular = data.boundary === "circular";
  const MARK = "#ff2d6f";
  // The sides of the window; innerWidth grows with what overflows it while the page is made.
  const root = document.documentElement;
  const thumb = () => (root.clientWidth < 480 ? 64 : 88);
  // As in the style sheet: the patches are below the sample then, not beside it.
  const isNarrow = () => window.matchMedia("(max-width: 48rem)").matches;
  const hasPatches = sizes.some((size) => size > 0);

  const state = {
    row: data.opensAt,
    y: data.pixelAtFirst[0],
    x: data.pixelAtFirst[1],
    view: "predicted",
    isHeld: false,
  };
  const pictures = {};
  const at = (id) => document.getElementById(id);
  const board = at("sample").firstElementChild;

  const CAPTIONS = {
    predicted: "The denoised image that this step predicts: in every pixel the average of its " +
      "training patches' centres, by weight.",
    noisy: "What the step starts from; values are clipped to what a picture can show.",
    mosaic: "In every pixel the centre of its heaviest training patch alone.",
    shared: "How many patches effectively share each pixel: exp of the entropy of the weights.",
  };

  function numbers(text, Type) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Type(bytes.buffer);
  }

  function load(name) {
    return new Promise((resolve, reject) => {
      const picture = new Image();
      picture.onload = () => {
        pictures[name] = picture;
        resolve();
      };
      picture.onerror = () => reject(new Error(name));
      picture.src = data[name];
    });
  }

  // Numbers as words.

  function share(weight) {
    if (weight === 0) return "0\u00a0%";
    const percent = 100 * weight;
    return (percent >= 0.001 ? String(Number(percent.toPrecision(3))) : percent.toExponential(1)) + "\u00a0%";
  }

  function count(value) {
    const rounded = value < 100 ? Number(value.toPrecision(3)) : Math.round(value);
    return rounded.toLocaleString("en");
  }

  // "1 image", "2.5 patches".
  function counted(value, thing) {
    const words = count(value);
    const plural = thing === "patch" ? "patches" : `${thing}s`;
    return `${words} ${words === "1" ? thing : plural}`;
  }

  function signed(value) {
    return value > 0 ? `+${value}` : value < 0 ? `\u2212${-value}` : "0";
  }

  function moved(dy, dx) {
    const words = [];
    if (dy) words.push(`${Math.abs(dy)} ${dy > 0 ? "down" : "up"}`);
    if (dx) words.push(`${Math.abs(dx)} ${dx > 0 ? "right" : "left"}`);
    return words.length ? words.join(", ") : "the same place";
  }

  function className(index) {
    if (data.labels === null) return "";
    const label = data.labels[index];
    return data.classNames === null ? `class ${label}` : data.classNames[label];
  }

  // What is known of a pixel at a step.

  function shorter(offset, side) {
    const half = Math.floor(side / 2);
    return ((offset + half + side) % side) - half;
  }

  function patchesOf(row, y, x) {
    const found = [];
    const start = ((row * height + y) * width + x) * top;
    for (let entry = start; entry < start + top; entry++) {
      // There are fewer candidates, or its image is not in this page.
      if (place[entry] < 0) continue;
      const centre = { y: Math.floor(pixel[entry] / imageWidth), x: pixel[entry] % imageWidth };
      let [dy, dx] = [centre.y - y, centre.x - x];
      if (data.kind === "ES") [dy, dx] = [shorter(dy, height), shorter(dx, width)];
      found.push({ index: place[entry], weight: weights[entry], ...centre, dy, dx });
    }
    return found;
  }

  function shared(row) {
    return effective[(row * height + state.y) * width + state.x];
  }

  // Pictures. A source is a picture, and the place and the sides of one image in it.

  function ofStep(name) {
    return { picture: pictures[name], left: 0, top: state.row * height, width, height };
  }

  function ofImage(index) {
    const columns = data.spriteColumns;
    return {
      picture: pictures.sprite,
      left: (index % columns) * imageWidth,
      top: Math.floor(index / columns) * imageHeight,
      width: imageWidth,
      height: imageHeight,
    };
  }

  function prepared(canvas, cssWidth, cssHeight) {
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${cssWidth}px`;
    canvas.style.height = `${cssHeight}px`;
    canvas.width = Math.round(cssWidth * ratio);
    canvas.height = Math.round(cssHeight * ratio);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    return context;
  }

  function drawWhole(canvas, source, cssWidth, outlines) {
    const context = prepared(canvas, cssWidth, (cssWidth * source.height) / source.width);
    const scale = canvas.width / source.width;
    context.drawImage(
      source.picture, source.left, source.top, source.width, source.height,
      0, 0, canvas.width, canvas.height);
    for (const outline of outlines) drawOutline(context, scale, source, outline);
  }

  function drawOutline(context, scale, { width, height }, { y, x, reach, strong }) {
    const side = (2 * reach + 1) * scale;
    const line = Math.max(1, Math.round((strong ? 2.5 : 1.5) * (window.devicePixelRatio || 1)));
    // A circular patch comes back in at the other side.
    const turns = isCircular ? [-1, 0, 1] : [0];
    for (const v of turns) {
      for (const h of turns) {
        const [left, up] = [(x - reach + h * width) * scale, (y - reach + v * height) * scale];
        const isOutside = left + side < 1 || up + side < 1 ||
          left > width * scale - 1 || up > height * scale - 1;
        if (isOutside && (v || h)) continue;
        context.lineWidth = line + 2;
        context.strokeStyle = "rgba(0, 0, 0, 0.75)";
        context.strokeRect(left, up, side, side);
        context.lineWidth = line;
        context.strokeStyle = strong ? MARK : "#ffffff";
        context.strokeRect(left, up, side, side);
      }
    }
  }

  function drawPatch(canvas, source, y, x, reach, cssSide) {
    const context = prepared(canvas, cssSide, cssSide);
    const scale = canvas.width / (2 * reach + 1);
    // Beyond the border patches read 0, which is this grey.
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const turns = isCircular ? [-1, 0, 1] : [0];
    for (const v of turns) {
      for (const h of turns) {
        context.drawImage(
          source.picture, source.left, source.top, source.width, source.height,
          (reach - x + h * source.width) * scale, (reach - y + v * source.height) * scale,
          source.width * scale, source.height * scale);
      }
    }
    drawOutline(context, scale, source, { y: reach, x: reach, reach: 0, strong: true });
  }

  // The page.

  function showBoard() {
    const room = at("sample").parentElement.clientWidth;
    const tall = ((isNarrow() ? 0.3 : 0.62) * root.clientHeight * width) / height;
    const cssWidth = Math.max(120, Math.floor(Math.min(room, tall, 26 * 16)));
    const size = sizes[state.row];
    const outlines = [{ y: state.y, x: state.x, reach: 0, strong: true }];
    if (size > 1) outlines.unshift({ y: state.y, x: state.x, reach: (size - 1) / 2, strong: false });
    drawWhole(board, ofStep(state.view), cssWidth, outlines);
    at("sample").classList.toggle("held", state.isHeld);
    at("caption").textContent = CAPTIONS[state.view];
    at("legend").hidden = state.view !== "shared";
  }

  function levelWords() {
    const step = steps[state.row];
    const size = sizes[state.row];
    const compared = size ? `${size}\u00a0\u00d7\u00a0${size}\u00a0patches` : "whole images";
    return `step ${step} of ${data.planSteps}: noise \u03c3 = ` +
      `${data.sigma[state.row].toFixed(3)}, ${compared}`;
  }

  function showLevel() {
    const words = levelWords();
    at("level").textContent = words[0].toUpperCase() + words.slice(1);
    at("step").value = state.row;
    at("step").setAttribute("aria-valuetext", words);
    at("earlier").disabled = state.row === 0;
    at("later").disabled = state.row === steps.length - 1;
  }

  function svg(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function showChart() {
    const chart = at("chart");
    const [wide, tall, left, right, high, low] = [chart.clientWidth || 300, 88, 34, 8, 8, 18];
    const decades = Math.max(1, Math.ceil(Math.log10(data.mostShared)));
    const x = (row) => left + ((wide - left - right) * row) / Math.max(1, steps.length - 1);
    const y = (value) => tall - low - ((tall - high - low) * Math.log10(Math.max(1, value))) / decades;
    const parts = [];
    const stride = Math.ceil(decades / 3);
    for (let power = 0; power <= decades; power += stride) {
      const level = y(10 ** power);
      parts.push(svg("line", { class: "grid", x1: left, x2: wide - right, y1: level, y2: level }));
      const label = power < 4 ? String(10 ** power) : `1e${power}`;
      parts.push(svg("text", { x: left - 5, y: level + 4, "text-anchor": "end" }, label));
    }
    const ends = [`step ${steps[0]}, noise`, `step ${steps[steps.length - 1]}, clean`];
    parts.push(svg("text", { x: left, y: tall - 3 }, ends[0]));
    parts.push(svg("text", { x: wide - right, y: tall - 3, "text-anchor": "end" }, ends[1]));
    const points = steps.map((_, row) => `${x(row).toFixed(1)},${y(shared(row)).toFixed(1)}`);
    parts.push(svg("polyline", { class: "curve", points: points.join(" ") }));
    parts.push(svg("circle", { class: "now", cx: x(state.row), cy: y(shared(state.row)), r: 4.5 }));
    chart.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    chart.replaceChildren(...parts);
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Rows are made once and filled again and again, so that pointing along a row of pixels is quick.
  const rows = Array.from({ length: top }, () => {
    const row = element("li");
    const shown = element("div", "pictures");
    const [whole, patch] = [element("canvas"), element("canvas")];
    for (const canvas of [whole, patch]) canvas.setAttribute("aria-hidden", "true");
    shown.append(whole, patch);
    const words = element("div", "words");
    const weight = element("p", "weight");
    const bar = element("div", "bar");
    bar.append(element("div"));
    const [image, offset] = [element("p", "image"), element("p", "detail offset")];
    words.append(weight, bar, image, offset);
    row.append(shown, words);
    at("patches").append(row);
    return { row, whole, patch, weight, bar: bar.firstChild, image, offset };
  });

  function showPatches() {
    const found = patchesOf(state.row, state.y, state.x);
    const size = sizes[state.row];
    const reach = (size - 1) / 2;
    const carried = found.reduce((sum, patch) => sum + patch.weight, 0);
    at("where").textContent = `Pixel in row ${state.y}, column ${state.x}` +
      (state.isHeld ? " (held)" : "");
    const sharers = counted(shared(state.row), size ? "patch" : "image");
    const these = found.length === 1 ? "this one carries" : `these ${found.length} carry`;
    at("summary").textContent =
      `${sharers} effectively ${sharers.startsWith("1 ") ? "makes" : "share"} it; ` +
      (found.length
        ? `${these} ${share(carried)} of the weight.`
        : "its heaviest patches are of images that are not in this page.");
    at("query").hidden = !size;
    at("query").style.display = size ? "" : "none";
    if (size) {
      drawPatch(at("query-noisy"), ofStep("noisy"), state.y, state.x, reach, thumb());
      drawPatch(at("query-predicted"), ofStep("predicted"), state.y, state.x, reach, thumb());
      at("compared").textContent = `The ${size} \u00d7 ${size} patch around the pixel is compared ` +
        "with the training patches; each gives its centre, marked here.";
    }
    rows.forEach((shown, rank) => {
      const patch = found[rank];
      shown.row.hidden = patch === undefined;
      if (patch === undefined) return;
      shown.patch.style.display = size ? "" : "none";
      const outlines = [{ y: patch.y, x: patch.x, reach: 0, strong: true }];
      if (size > 1) outlines.unshift({ y: patch.y, x: patch.x, reach, strong: false });
      drawWhole(shown.whole, ofImage(patch.index), thumb(), outlines);
      if (size) drawPatch(shown.patch, ofImage(patch.index), patch.y, patch.x, reach, thumb());
      const name = className(patch.index);
      shown.weight.textContent = share(patch.weight);
      shown.bar.style.width = `${100 * patch.weight}%`;
      shown.image.textContent = `image ${data.numbers[patch.index]}` + (name ? `, ${name}` : "");
      shown.offset.textContent = `from row ${patch.y}, column ${patch.x}: ${moved(patch.dy, patch.dx)} ` +
        `(dy\u00a0${signed(patch.dy)},\u00a0dx\u00a0${signed(patch.dx)})`;
    });
  }

  let isLoaded = false;
  function show() {
    // The window may be resized, and keys pressed, before the pictures are there.
    if (!isLoaded) return;
    showLevel();
    showBoard();
    showChart();
    showPatches();
  }

  // Pointing is not announced, only what was asked for by a key, a tap or the slider.
  let announcement = 0;
  function announce() {
    clearTimeout(announcement);
    announcement = setTimeout(() => {
      const [best] = patchesOf(state.row, state.y, state.x);
      const name = best ? className(best.index) : "";
      const heaviest = best
        ? `${share(best.weight)}, image ${data.numbers[best.index]}${name ? `, ${name}` : ""}, ` +
          moved(best.dy, best.dx)
        : "not in this page";
      const thing = hasPatches ? "patch" : "image";
      at("live").textContent =
        `Row ${state.y}, column ${state.x}, step ${steps[state.row]}. Heaviest ${thing}: ` +
        `${heaviest}. ${counted(shared(state.row), thing)} in effect.`;
    }, 150);
  }

  function moveTo(y, x) {
    state.y = Math.min(height - 1, Math.max(0, y));
    state.x = Math.min(width - 1, Math.max(0, x));
    show();
  }

  function stepTo(row) {
    state.row = Math.min(steps.length - 1, Math.max(0, row));
    show();
    announce();
  }

  function pointed(event) {
    const box = board.getBoundingClientRect();
    return [
      Math.floor(((event.clientY - box.top) / box.height) * height),
      Math.floor(((event.clientX - box.left) / box.width) * width),
    ];
  }

  let pointer = "mouse";
  board.addEventListener("pointerdown", (event) => {
    pointer = event.pointerType;
  });

  board.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch" || state.isHeld) return;
    const [y, x] = pointed(event);
    if (y !== state.y || x !== state.x) moveTo(y, x);
  });

  board.addEventListener("click", (event) => {
    const [y, x] = pointed(event);
    const isSame = y === state.y && x === state.x;
    // A finger does not hover: there is nothing to hold a pixel against.
    state.isHeld = pointer !== "touch" && !(state.isHeld && isSame);
    moveTo(y, x);
    announce();
  });

  at("sample").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = {
      ArrowUp: [state.y - 1, state.x],
      ArrowDown: [state.y + 1, state.x],
      ArrowLeft: [state.y, state.x - 1],
      ArrowRight: [state.y, state.x + 1],
      Home: [state.y, 0],
      End: [state.y, width - 1],
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    // The pointer may still lie on another pixel; what the keys found stays.
    state.isHeld = true;
    moveTo(...target);
    announce();
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "[") stepTo(state.row - 1);
    if (event.key === "]") stepTo(state.row + 1);
    if (event.key === "Escape" && state.isHeld) {
      state.isHeld = false;
      show();
    }
  });

  at("step").addEventListener("input", (event) => stepTo(Number(event.target.value)));
  at("earlier").addEventListener("click", () => stepTo(state.row - 1));
  at("later").addEventListener("click", () => stepTo(state.row + 1));
  at("views").addEventListener("change", (event) => {
    state.view = event.target.value;
    show();
  });
  window.addEventListener("resize", show);

  function introduce() {
    const isLocal = data.kind === "LS" || data.kind === "ELS";
    const beyond = isCircular ? "the opposite side" : "zeros";
    const boundary = isLocal ? `, which reads ${beyond} beyond the border,` : "";
    at("lede").textContent =
      `Drawn by the ${data.kind} machine${boundary} from ` +
      `${counted(data.images, "training image")}. ` +
      "At every step each pixel is an average of training patches; " +
      "choose a pixel and a step to see which, and how much each weighs.";
    const isThinned = steps.length < data.planSteps;
    const things = hasPatches ? "patches" : "images";
    const thing = hasPatches ? "patch" : "image";
    at("curve").textContent = `${things[0].toUpperCase()}${things.slice(1)} that share this pixel, ` +
      "step by step";
    at("limits").textContent =
      (isThinned ? `${steps.length} of ${counted(data.planSteps, "step")} are in this page. ` : "") +
      (data.tolerance === null
        ? ""
        : "The sample was drawn with approximate posteriors (mean absolute error " +
          `${data.tolerance}); the weights are their estimates, and the patches the heaviest ` +
          "of those that they read or that an index found. ") +
      `Each pixel has its ${top === 1 ? `heaviest ${thing}` : `${top} heaviest ${things}`} at ` +
      `each step, from ${counted(data.numbers.length, "training image")}, all in this page.` +
      (data.leftOut
        ? ` Those from ${counted(data.leftOut, "more image")}, with ` +
          `${share(1 - data.weightShown)} of the weight, did not fit and are left out.`
        : "") +
      (data.sprite.startsWith("data:image/jpeg")
        ? " The images are compressed: colours are off by a few of 255 levels."
        : "") +
      " Rows and columns count from 0; an offset goes from the pixel to the patch's centre.";
    at("step").max = steps.length - 1;
    at("shades").style.background = `linear-gradient(to right, ${data.shades.join(", ")})`;
    at("most").textContent = count(data.mostShared);
  }

  introduce();
  Promise.all(["sprite", "noisy", "predicted", "mosaic", "shared"].map(load)).then(
    () => {
      isLoaded = true;
      show();
      root.dataset.ready = "yes";
    },
    () => {
      at("lede").textContent = "This browser cannot decode the pictures of this page; " +
        "open it in another one, or make it again with a smaller --top.";
    });
})();
