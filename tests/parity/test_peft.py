"""Adapters beside peft's: trained alike, opened by either, merged or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from twin import MARKS, transformers

from adapters import write_adapter, write_base
from gemmule.formats.adapter import (
    CONFIG,
    WEIGHTS,
    Base,
    adapter_names,
    adapter_tensors,
    read_adapter_config,
    save_adapter,
    weights_sha256,
)
from gemmule.formats.folder import load_folder
from gemmule.model.lora import LoRA, add_lora, init_lora, merge
from gemmule.tokenizer import Tokenizer
from gemmule.train.loss import summed_loss
from gemmule.train.opening import load_with_path, open_unmerged
from tiny import greatest_difference, some_tokens

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = MARKS

STEPS, RATE = 50, 1e-3
KINDS = {
    "lora": LoRA(8, 16.0),
    "rslora": LoRA(8, 6.0, rank_stabilized=True),  # a scale of 2.1; 5.7 makes 2e-4 of a rounding
    "dora": LoRA(8, 16.0, dora=True),
    "two matrices": LoRA(4, 8.0, targets=("attention.query", "attention.value")),
    "rows": LoRA(8, 16.0, rows=(3, 12, 47)),
    "dora with rows": LoRA(8, 6.0, dora=True, rank_stabilized=True, rows=(3, 12, 47)),
}


@pytest.fixture
def base(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", tiny_tokenizer)


def open_with_peft(base: Path, folder: Path, trainable: bool = False) -> Any:
    """Let peft put an adapter on the base, in fp32."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable).train(trainable)


def losses_of(model: nn.Module, loss: Any) -> list[float]:
    """Train what learns with AdamW; return the loss of each step."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    found = []
    for _ in range(STEPS):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_have_the_losses_of_peft(kind: str, base: Path, tmp_path: Path) -> None:
    lora, (model, _), folder = KINDS[kind], load_folder(base), tmp_path / "adapter"
    sha256 = weights_sha256(model)
    add_lora(model.train(), lora)
    init_lora(model, seed=4)
    folder.mkdir()
    save_adapter(lora, adapter_tensors(model), Base(str(base), sha256), folder)
    twin = open_with_peft(base, folder, trainable=True)
    tokens = some_tokens(model.config, rows=4, length=23)
    tokens[:, ::5] = 12  # a row that learns
    targets = tokens.roll(-1, 1)

    def twins() -> Tensor:
        return functional.cross_entropy(twin(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())

    ours = losses_of(model, lambda: model(tokens, output_head=summed_loss(targets)) / targets.numel())
    theirs = losses_of(twin, twins)
    off = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert ours[-1] < ours[0] - 0.2
    assert off <= (1e-5 if lora.dora else 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_our_folder_and_uses_every_key(kind: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = write_adapter(folder, base, KINDS[kind])
    tokens = some_tokens(model.config, length=23)
    with torch.no_grad():
        twin = open_with_peft(base, folder)
        assert greatest_difference(model(tokens), twin(input_ids=tokens).logits) <= 1e-5
        report = peft.set_peft_model_state_dict(twin, load_file(folder / WEIGHTS))
        assert report.unexpected_keys == []
        assert not [name for name in report.missing_keys if ".default" in name and "lm_head" not in name]
        merged = twin.merge_and_unload()
        assert greatest_difference(merged(input_ids=tokens).logits, load_with_path(folder)[0](tokens)) <= 1e-4
    # What peft saves of it again are the same tensors and the same settings.
    open_with_peft(base, folder).save_pretrained(tmp_path / "again")
    ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    assert read_adapter_config(tmp_path / "again") == read_adapter_config(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_opens_here(kind: str, base: Path, tmp_path: Path) -> None:
    lora, options = KINDS[kind], {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    names = {"attention.query": "q_proj", "attention.value": "v_proj"}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if len(lora.targets) == 7 else [names[target] for target in lora.targets],
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        init_lora_weights=False,  # B is drawn, too
        trainable_token_indices=list(lora.rows) or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    twin = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "trainable_tokens" in name:
                parameter.mul_(1.5)
    folder = tmp_path / "theirs"
    twin.save_pretrained(folder)
    model = open_unmerged(folder)
    assert model is not None
    tokens = some_tokens(model.config, length=23)
    with torch.no_grad():
        wanted = twin(input_ids=tokens).logits
        assert greatest_difference(model(tokens), wanted) <= 1e-5
        assert greatest_difference(merge(model)(tokens), wanted) <= 1e-4
    names_of_ours = {theirs for _, theirs in adapter_names(model.config, read_adapter_config(folder).lora)}
    assert set(load_file(folder / WEIGHTS)) == names_of_ours


def test_peft_does_not_complain_of_our_settings(
    base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "adapter", base, KINDS["lora"])
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (8, 16, str(base))
    assert not [warning for warning in recwarn if "adapter" in str(warning.message).lower()]
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "adapter" / CONFIG).stat().st_mode == (tmp_path / "adapter" / WEIGHTS).stat().st_mode
