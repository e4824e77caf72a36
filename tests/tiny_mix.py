"""A few rows of each of the ten sources of configs/data/vlsi_mix.yaml, in the layout in which they are published."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.config_mix import split_sample

MIX = Path(__file__).resolve().parent.parent / "configs" / "data" / "vlsi_mix.yaml"


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def llava(image: str | None, question: str, answer: str, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return more | ({} if image is None else {"image": image}) | {"conversations": turns}


def make_downloads(root: Path) -> dict[str, int]:
    """Writes the files; returns the rows that each entry of the mix should find."""

    def put(path: str, rows: list[dict], image_folder: str | None = None) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        lines = path.endswith(".jsonl")
        (root / path).write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows, indent=1))
        for row in rows if image_folder is not None else ():
            images = row.get("image", [])
            for i, image in enumerate(images if isinstance(images, list) else [images]):
                (root / image_folder / image).parent.mkdir(parents=True, exist_ok=True)
                (root / image_folder / image).write_bytes(png(i))

    ask = "<image>\nWhat is it?"
    unpacked = "sharegpt-4o/mnt/petrelfs/wangwenhai/workspace_cef/4o/image"
    put("sharegpt-4o/image_conversations/gpt-4o.jsonl", [llava("1.jpg", ask, "A.")], unpacked)
    rows = [
        llava(f"{folder}/{i}.jpg", ask, "C") for i, folder in enumerate(("coco/train2017", "sam/images", "wikiart"))
    ]
    put("sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json", rows, "sharegpt4v")
    rows = [llava("gqa/images/1.jpg", ask, "I", model=""), llava(None, "Hi", "Hello", id="text")]
    put("sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json", rows, "sharegpt4v")
    vflan = "ALLaVA-4V/allava_vflan/images/1.jpg"
    put("minigemini/minigemini_pretrain.json", [llava(vflan, ask, "P"), llava("llava/1.jpg", ask, "no")], "minigemini")
    folders = ("docvqa/images", "chartqa/train/images", "dvqa/images", "ai2d/images", "gqa/images")
    rows = [llava(vflan, ask, "V"), llava(None, "t", "u"), *(llava(f"{f}/2.png", ask, f) for f in folders)]
    put("minigemini/minigemini_instruction.json", rows, "minigemini")
    put("allava-4v/allava_text/Evol-Instruct-GPT4-Turbo-143K.json", [llava(None, "Write.", "Text.", idx="x")] * 2)
    rows = [llava(f"{f}/1.png", ask, "S") for f in ("arxivqa/images", "TextbookQA/train", "other")]
    put("smr/SMR.json", rows, "smr")
    chat = [
        {"role": "user", "content": "<|image|>What is <image> in HTML?"},
        {"role": "assistant", "content": "A tag."},
    ]
    row = {"image": ["./imgs/ChartQA/1.png"], "messages": chat, "task_name": "qa_sft", "dataset_name": "ChartQA"}
    put("docdownstream-1.0/train.jsonl", [row] * 3, "docdownstream-1.0")
    put("docreason25k/detailed_explanation.jsonl", [row], "docreason25k")
    for name in ("alignment", "qa_tuning"):
        put(f"geo170k/{name}.json", [llava("geo3k/train/1/img.png", ask, name)], "geo170k/images")
    make_math(root)
    put("mathinstruct/MathInstruct.json", [{"source": "x", "output": "4", "instruction": "2 + 2"}])
    return dict(
        sharegpt4o_images=1,
        sharegpt4v_captions=2,
        sharegpt4v_instruct=2,
        allava_vflan=2,
        allava_text=2,
        minigemini=4,
        llava_hd=2,
        docowl_downstream=3,
        docowl_reasoning=1,
        gllava_align=1,
        gllava_qa=1,
        mathvision=2,
        mathinstruct=1,
        mathplus=3,
    )


def make_math(root: Path) -> None:
    """The two sources that are published as parquet."""
    import datasets

    image = {"bytes": png(), "path": None}
    rows = {
        "id": ["1", "2"],
        "question": ["How many? <image1>", "<image1> Which of <image1>?"],
        "options": [[], ["A", "B", "C"]],
        "image": ["images/1.jpg", "images/2.jpg"],
        "decoded_image": [image, image],
        "answer": ["7", "B"],
        "solution": [None, "because"],
    }
    vision = datasets.Dataset.from_dict(rows).cast_column("decoded_image", datasets.Image())
    plus = datasets.Dataset.from_dict({"instruction": [f"q{i}" for i in range(9)], "output": ["a"] * 9})
    for path, data in (("mathvision/data/test-00000.parquet", vision), ("math-plus/data/train-0.parquet", plus)):
        (root / path).parent.mkdir(parents=True)
        data.to_parquet(root / path)


def mix_config(root: Path, counts: dict[str, int]) -> list[SourceConfig]:
    """The sources of the true mix file on small downloads: only the numbers of rows are changed."""
    sources = []
    for source in DataConfig(train=str(MIX), root=str(root)).train:
        values = source.model_dump()
        if source.count is not None:
            values["count"] = counts[source.name]
        else:
            values["path"] = f"{split_sample(source.path)[0]}#{counts[source.name]}"
        sources.append(SourceConfig(**values))
    return sources
