"""What happens to the attention of the transformers families: a tiny checkpoint of each is saved, loaded and probed.

`python tests/transformers_coverage.py` writes the table into docs/supported-models.md; tests/test_transformers_coverage.py
holds the two together.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_text
import torch
import transformers
from torch import Tensor

from sbpatch.attention import Scatterbrain
from sbpatch.calibration.decide import first_decision
from sbpatch.data.batch import run
from sbpatch.errors import SbpatchError
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.load import load_checkpoint
from sbpatch.plan.plan import Budget, Plan, patch_tensors
from sbpatch.plan.report import shape
from sbpatch.sites.calls import Call
from sbpatch.sites.find import Site, find_sites
from sbpatch.sites.swap import swapped

PAGE = Path(__file__).parents[1] / "docs" / "supported-models.md"
HEAD = (
    "| family | class of the checkpoint | loaded as | class of site | sites | tokens | |\n|---|---|---|---|---|---|---|"
)

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = WIDTHS | {"image_size": 64, "patch_size": 4}
TEXT = WIDTHS | {"vocab_size": len(tiny_text.VOCABULARY), "max_position_embeddings": 96, "pad_token_id": 0}
TOKENS = {"vocab_size": len(tiny_text.VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
HYBRID = {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 24}
MODERNBERT = {"num_hidden_layers": 4, "local_attention": 24, "cls_token_id": 2, "sep_token_id": 2, **TOKENS}
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Family:
    """A tiny model: its name in the table, its class, the values of its configuration, and its image processor's."""

    name: str
    class_name: str
    values: dict[str, Any]
    processor: str | None = None
    sizes: dict[str, Any] = field(default_factory=lambda: {"size": {"height": 64, "width": 64}})
    config: Callable[[dict[str, Any]], Any] | None = None  # made from the values; else the class's own

    def build(self) -> transformers.PreTrainedModel:
        """The model with random weights, large enough that attention is far from uniform."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.class_name)
        model = cls((self.config or (lambda values: cls.config_class(**values)))(self.values)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any() or parameter.ndim > 1:
                    parameter.normal_(std=0.1)
        return model

    def save(self, folder: Path) -> None:
        """As `save_pretrained` of model and tokenizer or image processor leaves it."""
        model = self.build()
        model.save_pretrained(folder)
        if self.processor is not None:
            getattr(transformers, self.processor)(**self.sizes).save_pretrained(folder)
        elif model.main_input_name == "input_ids":
            tiny_text.words().save_pretrained(folder)


CROP = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
DEIT = {"size": {"height": 72, "width": 72}, "crop_size": {"height": 64, "width": 64}}
DECODER = {f"decoder_{key}": value for key, value in WIDTHS.items() if key != "num_hidden_layers"}
SEGFORMER = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
}  # fmt: skip
WHISPER = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 96,
    "decoder_start_token_id": 2,
}  # fmt: skip


def _towers(values: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": values, "text_config": TEXT | {"bos_token_id": 2, "eos_token_id": 2}}


FAMILIES = [
    Family("BERT", "BertModel", TEXT),
    Family("BERT", "BertForMaskedLM", TEXT),
    Family("RoBERTa", "RobertaForMaskedLM", TEXT | {"bos_token_id": 2}),
    Family("DistilBERT", "DistilBertForMaskedLM", TEXT | {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    Family("ViT", "ViTForImageClassification", VIT, "ViTImageProcessor"),
    Family("DeiT", "DeiTForImageClassificationWithTeacher", VIT, "DeiTImageProcessor", DEIT),
    Family("BEiT", "BeitForImageClassification", VIT | {"use_relative_position_bias": True}, "BeitImageProcessor"),
    Family("DINOv2", "Dinov2Model", VIT, "BitImageProcessor", CROP),
    Family(
        "CLIP", "CLIPModel", VIT, "CLIPImageProcessor", CROP, config=lambda v: transformers.CLIPConfig(**_towers(v))
    ),
    Family(
        "SigLIP", "SiglipModel", VIT, "SiglipImageProcessor", config=lambda v: transformers.SiglipConfig(**_towers(v))
    ),
    Family(
        "Swin",
        "SwinForImageClassification",
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8},
        "ViTImageProcessor",
    ),
    Family("Whisper", "WhisperForConditionalGeneration", WHISPER),
    Family("ViTMAE", "ViTMAEForPreTraining", VIT | DECODER | {"decoder_num_hidden_layers": 1}, "ViTImageProcessor"),
    Family("SegFormer", "SegformerForSemanticSegmentation", SEGFORMER, "SegformerImageProcessor"),
    Family("GPT-2", "GPT2LMHeadModel", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}),
    Family("Llama", "LlamaForCausalLM", TEXT | TOKENS | {"num_key_value_heads": 1}),
    Family("Qwen2", "Qwen2ForCausalLM", TEXT | TOKENS | {"num_key_value_heads": 1}),
    Family("Qwen3", "Qwen3ForCausalLM", TEXT | TOKENS | {"num_key_value_heads": 1, "head_dim": 16}),
    Family("Mistral", "MistralForCausalLM", TEXT | TOKENS | {"num_key_value_heads": 1, "sliding_window": 24}),
    Family(
        "Qwen2, sliding window",
        "Qwen2ForCausalLM",
        TEXT | TOKENS | HYBRID | {"use_sliding_window": True, "max_window_layers": 2},
    ),
    Family("Gemma 2", "Gemma2ForCausalLM", TEXT | TOKENS | HYBRID),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        TEXT | TOKENS | HYBRID | {"layer_types": [*3 * ["sliding_attention"], "full_attention"]},
    ),
    Family("Cohere 2", "Cohere2ForCausalLM", TEXT | TOKENS | HYBRID),
    Family("ModernBERT", "ModernBertForMaskedLM", TEXT | MODERNBERT),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        TEXT
        | TOKENS
        | HYBRID
        | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    Family("T5", "T5ForConditionalGeneration", TOKENS | SMALL | {"d_kv": 16, "d_ff": 48}),
]


def plan_on(loaded: Checkpoint) -> Plan:
    """Every site that can be patched, patched: causal ones by a window, the others by clusters."""
    plan = Plan(model=loaded.name, seed=0, budget=Budget(requested=0.2), sites=[])
    for site in find_sites(loaded.model, loaded.preprocessing.probe()):
        entry = first_decision(site, limit=1)
        if entry.decision == "patch":
            method, parameters = (
                ("window", {"window": 9}) if site.geometry.causal else ("clusters", {"rank": 6, "steps": 1})
            )
            entry.use(Scatterbrain(method, site.geometry, 0, **parameters), 0)
            entry.entropy, entry.entropy_ratio = [1.0] * entry.heads, 0.5
            entry.matrix_error = entry.output_error = 0.1
        plan.sites.append(entry)
    plan.settle_budget()
    plan.tensors = {
        f"{n}.{k}": t.clone() for n, layer in plan.layers().items() for k, t in patch_tensors(layer).items()
    }
    return plan


def check(loaded: Checkpoint, sites: list[Site]) -> None:
    """Every patchable site is reached once a forward, and once restored the model gives the same bits as before."""
    reached: Counter[str] = Counter()

    def through(name: str) -> Callable[[Call], Tensor]:
        def replacement(call: Call) -> Tensor:
            reached[name] += 1
            return call.exact()

        return replacement

    probe = loaded.preprocessing.probe()
    with torch.inference_mode():
        before = run(loaded.model, probe)
        with swapped(loaded.model, {site.name: through(site.name) for site in sites}):
            patched = run(loaded.model, probe)
        after = run(loaded.model, probe)
    assert reached == {site.name: 1 for site in sites}
    assert torch.equal(before, after)
    torch.testing.assert_close(patched, before, atol=1e-4, rtol=1e-3)


def rows(family: Family) -> list[str]:
    """What the family's checkpoint shows, one line a class of site and outcome."""
    with tempfile.TemporaryDirectory() as folder:
        family.save(Path(folder))
        try:
            loaded = load_checkpoint(folder)
        except SbpatchError as error:
            said = str(error).removeprefix(f"{folder}: ")
            return [f"| {family.name} | `{family.class_name}` | | | 0 | | refused: {said} |"]
    start = f"| {family.name} | `{family.class_name}` | `{type(loaded.model).__name__}`, {loaded.answer} |"
    sites = find_sites(loaded.model, loaded.preprocessing.probe())
    check(loaded, [site for site in sites if not site.unsupported])
    groups: dict[tuple[str, str, bool], list[Site]] = {}
    for site in sites:
        first = first_decision(site, limit=1)
        outcome = "patchable" if first.decision == "patch" else f"exact: {re.sub(r'[0-9]+', '#', first.reason)}"
        groups.setdefault((site.class_name, outcome, site.geometry.queries > 0), []).append(site)
    lines = []
    for (cls, outcome, _), group in groups.items():
        tokens = sorted({(site.geometry.tokens, site.geometry.queries) for site in group})
        span = " to ".join(dict.fromkeys(shape(*tokens[i]) for i in (0, -1)))
        causal = ", causal" if group[0].geometry.causal else ""
        lines.append(f"{start} `{cls}` | {len(group)} | {span}{causal} | {outcome} |")
    return lines


def table() -> str:
    return "\n".join([HEAD, *(row for family in FAMILIES for row in rows(family))]) + "\n"


def documented() -> str:
    """The table as the page has it."""
    text = PAGE.read_text(encoding="utf-8")
    return (text[text.index(HEAD) :] + "\n").partition("\n\n")[0] + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(documented(), table()), encoding="utf-8")
