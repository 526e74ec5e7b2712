// Numbers, durations, dollars and times as people read them.

const COUNT = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const NONE = "–";

export const count = (value) => (value === null || value === undefined ? NONE : COUNT.format(value));
export const short = (value) => (value === null || value === undefined ? NONE : SHORT.format(value));

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export function dollars(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "$0";
  return value < 0.01 ? `$${value.toPrecision(2)}` : `$${value.toFixed(value < 1 ? 4 : 2)}`;
}

export const percent = (share) => (share === null || share === undefined ? NONE : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)}%`);

export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });

export const day = (unix) => new Date(unix * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short", hour12: false });
