// One GPU as a stacked area over time, on one Chart.js instance that is kept. The bands are added up here, which is
// quicker than letting the library do it, and each is filled down to the one before.

import { sizes, times, timeWord } from "./axes.js";
import { bands, isRough, widest } from "./bands.js";
import { fill, inkOn, colour, patternName } from "./colours.js";
import { clusters, drawMarks } from "./marks.js";
import { nearest, thin } from "./series.js";
import { GIB } from "./words.js";

const MARKS_HIGH = 20;
const LIMITS = [
  ["hard_limit_bytes", "hard", []],
  ["soft_limit_bytes", "soft", [6, 3]],
  ["unload_threshold_bytes", "unload", [3, 3]],
  ["threshold_bytes", "threshold", [1, 3]],
];
const FONT = "system-ui, sans-serif";

/** The colours of the page as it is now. */
export function theme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    surface: read("surface"),
    free: read("free"),
    line: read("line"),
    text: read("text"),
    quiet: read("quiet"),
    good: read("good"),
    warn: read("warn"),
    bad: read("bad"),
  };
}

export class Plot {
  /** `canvas` stands in a box that has a height. */
  constructor(canvas) {
    this.canvas = canvas;
    this.marks = [];
    this.view = null;
    this.chart = null;
  }

  get area() {
    return this.chart?.chartArea ?? null;
  }

  /** Epoch seconds at a place of the canvas, and back. */
  at(x) {
    return this.chart.scales.x.getValueForPixel(x) / 1000;
  }

  x(at) {
    return this.chart.scales.x.getPixelForValue(at * 1000);
  }

  /** The index into the series that is drawn nearest to `at`, -1 where nothing is. */
  nearest(at) {
    const place = nearest(this.drawn.times, at);
    return place < 0 ? -1 : this.drawn.indices[place];
  }

  /** Draws `series` between `from` and `to` (epoch seconds). */
  show({ series, from, to, limits, events, compact }) {
    const points = Math.min(600, Math.max(120, this.canvas.parentElement.clientWidth));
    const indices = thin(series, from, to, compact ? Math.min(points, 300) : points);
    this.drawn = { indices, times: indices.map((index) => series.at[index]) };
    // A GPU that is smaller now than it was: a card exchanged under its name, or a share of one.
    const usable = indices.map((index) => series.taken_bytes[index] + series.free_bytes[index]);
    this.view = {
      series,
      total: Math.max(series.total_bytes, ...usable),
      from,
      to,
      limits,
      events,
      colours: theme(),
      bands: bands(series, indices),
      rough: isRough(series, indices),
    };
    const settings = this.settings(compact);
    if (this.chart === null) {
      // It draws before it is there: `beforeInit` keeps it.
      new globalThis.Chart(this.canvas, settings);
      return;
    }
    this.chart.data = settings.data;
    this.chart.options = settings.options;
    this.chart.update("none");
  }

  end() {
    this.chart?.destroy();
    this.chart = null;
  }

  datasets() {
    const { bands, colours, rough } = this.view;
    const context = this.canvas.getContext("2d");
    return bands.map((band, place) => ({
      data: band.points,
      fill: band.line ? false : place === 0 ? "origin" : "-1",
      backgroundColor: paint(context, band, colours),
      borderColor: band.line ? colours.text : colours.surface,
      // Between two bands runs a line of the ground, where it would not hide what is drawn.
      borderWidth: band.line ? 1 : rough ? 0 : 0.8,
      borderDash: band.line ? [1, 2] : [],
    }));
  }

  settings(compact) {
    const { total, from, to, colours } = this.view;
    const narrow = this.canvas.parentElement.clientWidth < 420;
    const grid = { color: colours.line, tickColor: colours.line };
    const font = { family: FONT, size: 11 };
    return {
      type: "line",
      data: { datasets: this.datasets() },
      options: {
        animation: false,
        responsive: true,
        maintainAspectRatio: false,
        parsing: false,
        normalized: true,
        events: [],
        layout: { padding: { top: MARKS_HIGH, right: 60 } },
        elements: { point: { radius: 0 }, line: { tension: 0 } },
        plugins: {
          legend: { display: false },
          tooltip: { enabled: false },
          filler: { drawTime: "beforeDatasetsDraw" },
        },
        scales: {
          x: {
            type: "time",
            min: from * 1000,
            max: to * 1000,
            grid: { ...grid, display: false },
            border: { color: colours.line },
            ticks: {
              color: colours.quiet,
              font,
              maxRotation: 0,
              autoSkip: false,
              callback: (ms) => timeWord(ms / 1000, to - from),
            },
            afterBuildTicks: (axis) => (axis.ticks = times(from, to, narrow ? 4 : 8)),
          },
          y: {
            min: 0,
            max: total,
            grid,
            border: { display: false },
            ticks: { color: colours.quiet, font, padding: 6, callback: (bytes) => `${+(bytes / GIB).toFixed(1)} GiB` },
            afterBuildTicks: (axis) => (axis.ticks = sizes(total, compact ? 3 : 5)),
          },
        },
      },
      plugins: [
        {
          id: "vram",
          beforeInit: (chart) => (this.chart = chart),
          beforeDraw: () => this.under(),
          afterDatasetsDraw: () => this.over(),
        },
      ],
    };
  }

  /** Where nothing is known the ground is hatched. */
  under() {
    const pen = this.chart.ctx;
    const { left, top, width, height } = this.area;
    pen.save();
    pen.fillStyle = fill(pen, { paint: this.view.colours.surface, pattern: "hatch" }, this.view.colours.line);
    pen.fillRect(left, top, width, height);
    pen.restore();
  }

  over() {
    const pen = this.chart.ctx;
    pen.save();
    this.names(pen);
    this.limits(pen);
    this.marks = clusters(this.view.events, (at) => this.x(at), this.area);
    drawMarks(pen, this.marks, this.area, this.view.colours);
    pen.restore();
  }

  limits(pen) {
    const { left, right } = this.area;
    const { limits, total, colours } = this.view;
    pen.font = `10px ${FONT}`;
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    let lowest = -Infinity;
    for (const [name, word, dash] of LIMITS) {
      const bytes = limits?.[name];
      if (!bytes || bytes > total) continue;
      const y = this.chart.scales.y.getPixelForValue(bytes);
      const label = Math.max(y, lowest + 11);
      lowest = label;
      pen.strokeStyle = pen.fillStyle = word === "hard" || word === "soft" ? colours.bad : colours.text;
      pen.lineWidth = 1.2;
      pen.setLineDash(dash);
      pen.beginPath();
      pen.moveTo(left, y);
      pen.lineTo(right, y);
      pen.stroke();
      pen.setLineDash([]);
      pen.lineWidth = 0.8;
      pen.beginPath();
      pen.moveTo(right, y);
      pen.lineTo(right + 5, label);
      pen.stroke();
      pen.fillText(word, right + 7, label);
    }
  }

  /** Each band says whose it is, where it is high and wide enough. */
  names(pen) {
    const { bands } = this.view;
    const xs = this.drawn.times.map((at) => this.x(at));
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const [place, band] of bands.entries()) {
      if (!band.tenant) continue;
      pen.font = `600 11px ${FONT}`;
      const room = widest(
        xs,
        band.points,
        bands[place - 1]?.points,
        this.chart.scales.y,
        this.area,
        pen.measureText(band.word).width + 6,
      );
      if (room === null) continue;
      const width = pen.measureText(band.word).width + 8;
      const ground = colour(band);
      if (patternName(band) !== "solid") {
        pen.fillStyle = ground;
        pen.fillRect(room.x - width / 2, room.y - 7, width, 14);
      }
      pen.fillStyle = inkOn(ground);
      pen.fillText(band.word, room.x, room.y + 0.5);
    }
  }
}

function paint(context, band, colours) {
  if (band.line) return "transparent";
  if (band.free) return colours.free;
  if (band.leased) return fill(context, { paint: colours.free, pattern: "stripes" }, colours.text);
  if (band.reserve) return colours.line;
  return fill(context, { paint: colour(band), pattern: patternName(band) }, colours.surface);
}
