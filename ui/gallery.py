"""A clickable gallery of cells: one inline component, since hundreds of Streamlit buttons do not scale."""

from __future__ import annotations

import streamlit as st

from inference.cells import CellResult
from ui.components import probability

_HTML = '<div class="tiles" role="list"></div>'

# thumbs on near-black, a thin bar under each on the P(ALL) scale; names reach the page as text, never as HTML
_CSS = """
.tiles {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px;
  font-family: var(--st-font);
}
.tile {
  all: unset; display: block; width: 100%; cursor: pointer; position: relative; overflow: hidden; border-radius: 8px;
  background: #050507; color: #E8E9EC; text-shadow: 0 0 3px #000, 0 0 3px #000;
}
.tile img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.tile .p { position: absolute; right: 6px; bottom: 9px; font-size: 13px; font-variant-numeric: tabular-nums; }
.tile .note { position: absolute; left: 6px; top: 4px; font-size: 12px; }
.tile .bar { height: 4px; }
.tile:hover, .tile:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 1px; }
"""

_JS = """
function shade(p) {
  const stops = [[59,111,168],[154,160,166],[217,130,43]];
  const i = p < .5 ? 0 : 1, t = (p - i * .5) * 2;
  return 'rgb(' + stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * t)).join(',') + ')';
}
function draw(tile, cell) {
  tile.title = cell.title;
  tile.setAttribute('aria-label', `${cell.title}, P(ALL) ${cell.told}. Open in Explain`);
  const picture = document.createElement('img');
  picture.src = cell.thumb; picture.alt = '';
  const value = document.createElement('span');
  value.className = 'p'; value.textContent = cell.told;
  const bar = document.createElement('div');
  bar.className = 'bar'; bar.style.background = shade(cell.p);
  tile.replaceChildren(picture, value, bar);
  if (cell.note) {
    const note = document.createElement('span');
    note.className = 'note'; note.textContent = 'note';
    tile.append(note);
  }
}
function item(number) {
  const made = document.createElement('div');
  made.setAttribute('role', 'listitem');
  made.dataset.number = number;
  const tile = document.createElement('button');
  tile.className = 'tile';
  made.append(tile);
  return made;
}
// One stop of the Tab key for all tiles; from there arrows go on, as in a grid.
function step(event, tiles) {
  const all = [...tiles.querySelectorAll('.tile')], here = all.indexOf(event.target);
  const across = all.filter(tile => tile.offsetTop === all[0].offsetTop).length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -here, End: all.length - 1 - here };
  const next = event.key in by && all[here + by[event.key]];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
function stop(tiles, tile) {
  for (const other of tiles.querySelectorAll('.tile')) other.tabIndex = other === tile ? 0 : -1;
}
// A cell keeps its tile from drawing to drawing, so that the keyboard's focus stays where it is while cells come in.
export default function ({ parentElement, data, setTriggerValue }) {
  const tiles = parentElement.querySelector('.tiles'), root = tiles.getRootNode(), focused = root.activeElement;
  const there = new Map([...tiles.children].map(child => [child.dataset.number, child]));
  data.forEach((cell, place) => {
    const found = there.get(String(cell.number)) ?? item(cell.number), tile = found.firstChild;
    const drawn = JSON.stringify(cell);
    if (tile.drawn !== drawn) { draw(tile, cell); tile.drawn = drawn; }
    tile.onclick = () => setTriggerValue('open', cell.number);
    tile.onfocus = () => stop(tiles, tile);
    if (tiles.children[place] !== found) tiles.insertBefore(found, tiles.children[place] ?? null);
  });
  while (tiles.children.length > data.length) tiles.lastChild.remove();
  tiles.onkeydown = event => step(event, tiles);
  if (focused?.isConnected && root.activeElement !== focused) focused.focus({ preventScroll: true });
  stop(tiles, root.activeElement?.classList.contains('tile') ? root.activeElement : tiles.querySelector('.tile'));
}
"""

_gallery = st.components.v2.component("blastoscope_gallery", html=_HTML, css=_CSS, js=_JS)


def gallery(cells: list[CellResult], threshold: float, *, key: str) -> int | None:
    """Draw scored cells as tiles; returns the number of the one that was just clicked, else None."""
    data = [
        {
            "number": cell.kept.number,
            "thumb": cell.kept.thumb,
            "p": cell.p_all,
            "told": probability(cell.p_all, threshold),
            "title": f"{cell.file}{' · ' + cell.note if cell.note else ''}",
            "note": bool(cell.note),
        }
        for cell in cells
    ]
    return _gallery(data=data, key=key, on_open_change=lambda: None).open
