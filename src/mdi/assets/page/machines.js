// The machines behind the model, live: who has which layers, what each does, and what happened to them.

import { findModel, get, ServerError } from "./api.js";
import { html } from "./html.js";
import { changed, state } from "./state.js";

const EVERY_MS = 1000;
const KEPT_EVENTS = 30;

let last = null; // {report, at}

/** Asks the server again and again, as long as the page is seen. */
export async function watch() {
  for (;;) {
    if (!document.hidden && !state.needsKey) await look();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

async function look() {
  try {
    const report = await get("v1/nodes");
    seen(report);
    await findModel();
  } catch (error) {
    if (error instanceof ServerError && error.status === 0) away();
    else if (error.name === "TimeoutError") away();
  }
  changed();
}

function away() {
  if (!state.awaySince) {
    state.awaySince = Date.now();
    happened("The server does not answer.", true);
  }
}

function seen(report) {
  const at = performance.now();
  if (state.awaySince) {
    state.awaySince = null;
    state.model = null; // it may be another one now
    happened("The server answers again.");
  }
  if (last) compare(last.report, report, (at - last.at) / 1000);
  last = { report, at };
  state.report = report;
}

function compare(before, now, seconds) {
  const earlier = new Map(before.nodes.map((node) => [key(node), node]));
  for (const node of now.nodes) {
    const same = earlier.get(key(node));
    if (!same) continue;
    if (same.state !== node.state) stateChanged(node);
    const moved = traffic(node) - traffic(same);
    state.rates.set(key(node), same.pid === node.pid && moved >= 0 ? moved / seconds : 0);
  }
  if (before.recovering && !now.recovering) happened("All machines are back: answers go on.");
  if (now.failed_requests > before.failed_requests)
    happened(`${now.failed_requests - before.failed_requests} requests ended with their machines.`, true);
  const tokens = now.requests.generated_tokens - before.requests.generated_tokens;
  state.tokensPerSecond = Math.max(0, tokens) / seconds;
}

function stateChanged(node) {
  if (node.state === "lost") happened(`${node.name} was lost${node.error ? `: ${node.error}` : ""}. Answers wait.`, true);
  else if (node.state === "failed") happened(`${node.name} failed: ${node.error}`, true);
  else if (node.state === "leaving") happened(`${node.name} was asked to end.`);
  else if (node.state === "ready") happened(`${node.name} is ready.`);
}

function happened(text, bad = false) {
  state.events = [{ when: new Date(), text, bad }, ...state.events].slice(0, KEPT_EVENTS);
}

function key(node) {
  return `${node.replica ?? ""}/${node.name}`;
}

function traffic(node) {
  return node.sent_bytes + node.received_bytes;
}

export function Machines() {
  const { report } = state;
  if (!report) return html`<p class="quiet">${state.awaySince ? "The server does not answer." : "Asking the server…"}</p>`;
  return html`<${Strip} report=${report} />
    <${Figures} report=${report} />
    <${Events} />
    <ul class="nodes">
      ${report.nodes.map((node) => html`<${Node} key=${key(node)} node=${node} report=${report} />`)}
    </ul>
    <p class="quiet">Why this split: ${report.plan.reason}.</p>`;
}

/** A band of all layers; each stage has its part of it, and each of the stage's nodes its share of that. */
export function Strip({ report }) {
  const replicas = new Map();
  for (const node of report.nodes) {
    const row = replicas.get(node.replica ?? "") ?? [];
    if (node.last_layer) replicas.set(node.replica ?? "", [...row, node]);
  }
  return html`<div class="strip" role="img" aria-label=${spoken(report)}>
    ${[...replicas.values()].map(
      (nodes) => html`<div class="row">
        ${stages(nodes).map(
          (ranks) => html`<div key=${key(ranks[0])} class="stage" style=${{ flexGrow: ranks[0].last_layer - ranks[0].first_layer }}>
            ${ranks.map(
              (node) => html`<div key=${key(node)} class=${`part ${tone(node)}`} style=${{ flexGrow: share(node) }}>
                <span>${layers(node)}${node.shards && ` · ${percent(share(node))}`}</span>
                <i style=${{ width: `${Math.round(node.busy_share * 100)}%` }}></i>
              </div>`,
            )}
          </div>`,
        )}
      </div>`,
    )}
  </div>`;
}

function stages(nodes) {
  const found = new Map();
  for (const node of nodes) found.set(node.group, [...(found.get(node.group) ?? []), node]);
  return [...found.values()];
}

function spoken(report) {
  const nodes = report.nodes.filter((node) => node.last_layer);
  const parts = nodes.map((node) => [node.name, layers(node), node.shards && `${percent(share(node))} of them,`, node.state]);
  return `Layers of the machines: ${parts.map((part) => part.filter(Boolean).join(" ")).join("; ")}`;
}

/** A node's part of its stage, which others of its group may share. */
function share({ shards }) {
  return shards ? (shards.last_shard - shards.first_shard) / shards.n_shards : 1;
}

function percent(part) {
  return `${Math.round(part * 100)} %`;
}

function tone(node) {
  if (node.state === "ready") return "good";
  return node.state === "lost" || node.state === "failed" ? "bad" : "busy";
}

function layers(node) {
  if (!node.last_layer) return node.role === "vision" ? "images" : "no layers";
  return node.last_layer - node.first_layer === 1 ? `${node.first_layer}` : `${node.first_layer}–${node.last_layer - 1}`;
}

function Figures({ report }) {
  const figures = [
    ["tokens/s", state.tokensPerSecond.toFixed(state.tokensPerSecond < 10 ? 1 : 0)],
    ["running", report.requests.running],
    ["waiting", report.requests.waiting],
    ["cache", percent(report.cache.used_share)],
  ];
  if (report.recoveries) figures.push(["recoveries", report.recoveries]);
  return html`<dl class="figures">
    ${figures.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function Node({ node, report }) {
  const stage = report.plan.stages.find((each) => each.node === node.name);
  const holds = stage?.holds.map((part) => ({ embedding: "embedding", vision: "vision", head: "LM head" })[part]) ?? [];
  const rate = state.rates.get(key(node)) ?? 0;
  const facts = [
    ["layers", [layers(node), ...holds].join(", ")],
    ...(node.shards ? [["group", inGroup(node, report)]] : []),
    ["device", [node.device, node.kernels].filter(Boolean).join(" ")],
    ["dtype", dtype(node)],
    ["memory", `${Math.round(node.resident_bytes / 1e6).toLocaleString("en")} MB`],
    ["busy", percent(node.busy_share)],
    ["links", `${(rate / 1e6).toFixed(2)} MB/s`],
  ];
  if (node.round_trip_s !== null) facts.push(["round trip", `${(node.round_trip_s * 1000).toFixed(1)} ms`]);
  if (node.restarts) facts.push(["restarts", node.restarts]);
  return html`<li class=${`node ${tone(node)}`}>
    <h2>${node.name}<span class="state">${node.state}</span></h2>
    ${node.error && html`<p class="error">${node.error}</p>`}
    <dl>${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
  </li>`;
}

function inGroup(node, report) {
  const ranks = report.nodes.filter((other) => other.group === node.group && other.replica === node.replica);
  return `rank ${node.rank} of ${ranks.length}, ${percent(share(node))}`;
}

function dtype(node) {
  const { layers: format } = node.quantization;
  return format ? `${format}, ${node.dtype}` : node.dtype;
}

function Events() {
  if (!state.events.length) return null;
  return html`<h2>What happened</h2>
    <div class="events" tabindex="0" role="log" aria-label="What happened to the machines">
      <ol>
      ${state.events.map(
        (event) => html`<li key=${event.when.getTime() + event.text} class=${event.bad ? "bad" : ""}>
          <time datetime=${event.when.toISOString()}>${event.when.toLocaleTimeString()}</time> ${event.text}
        </li>`,
      )}
      </ol>
    </div>`;
}
