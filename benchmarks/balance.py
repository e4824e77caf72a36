"""How long ranks wait for each other, by how the rows of a step are dealt: cost of a step over the ideal. Needs no GPU.

    python benchmarks/balance.py [--config configs/qwen2vl_72b_to_7b.yaml] [--stage interact]

Ideal is the cost of all rows, without padding, shared evenly by the ranks. A step costs the sum, over its rounds, of
the costliest micro-batch (ZeRO-3 keeps ranks in lockstep); costs are the planner's operations. Two sets of lengths:

    assumed  lognormal, mean 743 tokens, sigma 0.75, cut at data.max_length; an image has 60% of a row's tokens, at
             most 1280, the answer 17%
    files    rows written in the layout of each source of configs/data/vlsi_mix.yaml, with lengths and image sizes
             assumed for that source (`SOURCES`), read by the readers and measured by `data.row_sizes`

The real sources were not at hand: both are assumptions. Writes `balance.json` and prints it as the last line; exits
with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from report import origin
from rich.console import Console
from rich.table import Table
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlsi_fast.config import RunConfig, load_config
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import VlsiDataset, build_processor, build_source, load_processor
from vlsi_fast.data.balancing import Load, cost_of, deal
from vlsi_fast.data.row_sizes import COLUMNS, SizeTable
from vlsi_fast.planner.rows import row_operations
from vlsi_fast.planner.shapes import read_config
from vlsi_fast.stages.sampling import RowCosts

ROOT = Path(__file__).resolve().parent.parent
RANKS, ROWS, ACCUMULATION = (8, 64, 512), 2, 16
BARS = {8: 1.15, 64: 1.25}
"""Of balanced packed rows, by ranks."""
ROWS_OF_A_SOURCE = 150
WORD = " the"
PHOTO, PAGE, CHART, FIGURE = (
    ((640, 480), (480, 640)),
    ((1240, 1754), (1700, 2200)),
    ((800, 600), (850, 600)),
    ((400, 300),),
)


@dataclass(frozen=True)
class Source:
    """One source of the mix, and what is assumed of its rows."""

    name: str
    weight: float  # thousands of rows, as in the mix
    reader: str
    question: int  # median tokens
    answer: int
    images: tuple[tuple[int, int], ...] = ()  # width x height, pixels


SOURCES = (
    Source("sharegpt4o_images", 57.289, "llava", 15, 350, PHOTO),
    Source("sharegpt4v_captions", 91.021, "llava", 15, 220, PHOTO),
    Source("sharegpt4v_instruct", 664.703, "llava", 60, 110, PHOTO),
    Source("allava_vflan", 405.617, "llava", 40, 180, PHOTO),
    Source("allava_text", 143.0, "llava", 80, 350),
    Source("minigemini", 27.67, "llava", 25, 20, CHART),
    Source("llava_hd", 116.035, "llava", 80, 40, CHART),
    Source("docowl_downstream", 574.268, "messages", 30, 30, PAGE),
    Source("docowl_reasoning", 25.877, "messages", 40, 250, PAGE),
    Source("gllava_align", 60.252, "llava", 30, 60, FIGURE),
    Source("gllava_qa", 117.205, "llava", 120, 130, FIGURE),
    Source("mathvision", 3.04, "qa", 90, 5, FIGURE),
    Source("mathinstruct", 262.04, "qa", 70, 150),
    Source("mathplus", 304.754, "qa", 60, 300),
)
SPREAD = 0.6
"""Sigma of the lognormal lengths around a source's medians."""


def main() -> int:
    """Deal, weigh, print. Returns 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/qwen2vl_72b_to_7b.yaml", help="whose costs (default: %(default)s)")
    parser.add_argument("--stage", default="interact", help="whose costs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps to average over (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks (default: 8 64 512)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    arguments = parser.parse_args()
    config = load_config(ROOT / arguments.config)
    roles = ("student",) if arguments.stage == "sft" else ("student", "teacher")
    configs = {role: read_config(getattr(config, role), role) for role in roles}
    operations = row_operations(config, arguments.stage, configs)
    with tempfile.TemporaryDirectory() as folder:
        measured = {"assumed": assumed(config.data.max_length), "files": from_files(Path(folder), config)}
    result: dict[str, Any] = {
        "benchmark": "balance",
        "arguments": {name: value for name, value in vars(arguments).items() if name != "out"},
        "rows": ROWS,
        "accumulation": ACCUMULATION,
        "lengths": {name: facts(sizes, weights) for name, (sizes, weights) in measured.items()},
        "cost_over_ideal": {},
        "bars": BARS,
    }
    for name, (sizes, weights) in measured.items():
        costs = {
            packed: RowCosts(dict.fromkeys(roles, sizes), operations, dict.fromkeys(roles, packed))
            for packed in (False, True)
        }
        result["cost_over_ideal"][name] = {
            ranks: over_ideal(costs, weights, ranks, arguments.steps) for ranks in arguments.ranks
        }
    found = result["cost_over_ideal"]
    result["bars_met"] = all(
        found[name][ranks]["balanced packed"] <= bar
        for name in found
        for ranks, bar in BARS.items()
        if ranks in found[name]
    )
    result |= origin(torch.device("cpu"))
    print_table(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "balance.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["bars_met"] else 1


# ---- lengths ----


def assumed(longest: int, count: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    """[count, 4] sizes of the assumption above, and equal weights."""
    drawn = np.random.default_rng(0).lognormal(0.0, 0.75, count)
    tokens = (drawn * 743 / drawn.mean()).clip(16, longest).astype(np.int64)
    image = np.minimum(0.6 * tokens, 1280).astype(np.int64)
    sizes = np.stack([tokens, (0.17 * tokens).astype(np.int64), 4 * image, np.ones_like(tokens)], axis=1)
    return sizes.astype(np.int32), np.full(count, 1 / count)


def from_files(folder: Path, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of rows of all sources, measured in files in `folder`, and the weights by which the mix draws them."""
    sources = [write_source(folder, source, random.Random(source.name)) for source in SOURCES]
    words = load_processor(ROOT / "vlsi_fast" / "demo" / "models" / "teacher")
    bounds = {"shortest_edge": config.data.min_pixels or 56 * 56, "longest_edge": config.data.max_pixels or 1003520}
    image = Qwen2VLImageProcessorPil(patch_size=14, size=bounds)
    processor = build_processor(
        "Qwen2VLProcessor", words.tokenizer, image, words.tokenizer.chat_template or words.chat_template
    )
    data = DataConfig(train=sources, max_length=config.data.max_length)
    table = SizeTable(VlsiDataset(build_source(data.train), {"student": processor}, data))
    sizes = table.measure(np.arange(len(table.dataset)), 0)[0]
    weights = np.repeat([source.weight / ROWS_OF_A_SOURCE for source in SOURCES], ROWS_OF_A_SOURCE)
    return sizes, weights / weights.sum()


def write_source(folder: Path, source: Source, chance: random.Random) -> dict[str, Any]:
    """Write a source's rows and images; returns its entry for `data.train`."""
    rows = []
    for width, height in source.images:
        Image.new("L", (width, height)).save(folder / f"{width}x{height}.png")
    for _ in range(ROWS_OF_A_SOURCE):
        question, answer = (
            WORD * max(1, round(m * chance.lognormvariate(0, SPREAD))) for m in (source.question, source.answer)
        )
        image = "{}x{}.png".format(*chance.choice(source.images)) if source.images else None
        rows.append(LAYOUTS[source.reader](question, answer, image))
    path = folder / f"{source.name}.json"
    path.write_text(json.dumps(rows))
    entry = {"reader": source.reader, "path": str(path), "name": source.name}
    return entry | ({"placeholder": "<|image|>"} if source.reader == "messages" else {})


def _llava(question: str, answer: str, image: str | None) -> dict:
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"conversations": turns} | ({"image": image} if image else {})


def _messages(question: str, answer: str, image: str | None) -> dict:
    turns = [{"role": "user", "content": f"<|image|>{question}"}, {"role": "assistant", "content": answer}]
    return {"image": [image], "messages": turns}


def _qa(question: str, answer: str, image: str | None) -> dict:
    return {"instruction": question, "output": answer} | ({"image": image} if image else {})


LAYOUTS = {"llava": _llava, "messages": _messages, "qa": _qa}


def facts(sizes: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Of the tokens of a row: mean, quantiles, and the shares that are image and answer."""
    tokens = sizes[:, COLUMNS.index("tokens")]
    order = np.argsort(tokens)
    reached = np.cumsum(weights[order])
    quantiles = {f"p{q}": int(tokens[order][np.searchsorted(reached, q / 100)]) for q in (10, 50, 90, 99)}
    mean = float(tokens @ weights)
    answers, patches = (float(sizes[:, COLUMNS.index(name)] @ weights) for name in ("answers", "patches"))
    return {"rows": len(tokens), "mean": mean, **quantiles, "max": int(tokens.max())} | {
        "answer_share": answers / mean,
        "image_share": patches / 4 / mean,
    }


# ---- ways to deal ----


def over_ideal(costs: dict[bool, RowCosts], weights: np.ndarray, ranks: int, steps: int) -> dict[str, float]:
    """Way to deal -> cost of a step over the ideal, mean over steps; `costs`: packed or not -> of the rows."""
    chance, sums = np.random.default_rng(1), {}
    count = ranks * ACCUMULATION
    for _ in range(max(1, steps * 8 // ranks) if ranks > 8 else steps):
        rows = chance.choice(len(weights), count * ROWS, p=weights).tolist()
        padded, packed = costs[False].load(rows), costs[True].load(rows)
        by_place = [list(range(at, at + ROWS)) for at in range(0, len(rows), ROWS)]
        ideal = sum(packed.alone.tolist()) / ranks
        for way, load, parts in (
            ("padded by place", padded, by_place),
            ("padded, sorted on each rank", padded, sorted_on_each_rank(padded, by_place, ranks)),
            ("packed by place", packed, by_place),
            ("balanced padded", padded, deal(padded, count)),
            ("balanced packed", packed, deal(packed, count)),
        ):
            sums.setdefault(way, []).append(waited(load, parts, ranks) / ideal)
    return {way: float(np.mean(values)) for way, values in sums.items()}


def waited(load: Load, parts: list[list[int]], ranks: int) -> int:
    """Cost of a step: the costliest micro-batch of each round."""
    found = [cost_of(load, part) for part in parts]
    return sum(max(found[at : at + ranks]) for at in range(0, len(found), ranks))


def sorted_on_each_rank(load: Load, by_place: list[list[int]], ranks: int) -> list[list[int]]:
    """Each rank's own rows of the step, sorted by length into its micro-batches."""
    length, parts = load.lengths.sum(axis=0), [[] for _ in by_place]
    for rank in range(ranks):
        rows = sorted((row for part in by_place[rank::ranks] for row in part), key=lambda row: -length[row])
        parts[rank::ranks] = [rows[at : at + ROWS] for at in range(0, len(rows), ROWS)]
    return parts


def print_table(result: dict[str, Any]) -> None:
    """A row a way, a column for each set of lengths and number of ranks."""
    found = result["cost_over_ideal"]
    table = Table("cost over ideal", *(f"{name}, {ranks} ranks" for name in found for ranks in found[name]))
    for way in next(iter(next(iter(found.values())).values())):
        table.add_row(way, *(f"{found[name][ranks][way]:.2f}" for name in found for ranks in found[name]))
    console = Console()
    for name, lengths in result["lengths"].items():
        console.print(name, {key: round(value, 2) for key, value in lengths.items()})
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
