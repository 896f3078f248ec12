"""TRL's trainers balance exactly when ``Balanced`` stands before their class."""

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from mixtura.hf import convert
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.training.balanced import Balanced
from pico import pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer
from training.splits import Gradients

TERMS = {"load-balancing": 1.0, "router-z-loss": 0.1}
TEXTS = Dataset.from_dict({"text": ["ab" * n for n in (5, 16, 9, 12, 3, 16, 7, 14)] * 2})
PAIRS = Dataset.from_dict(
    {
        "prompt": ["p" * n for n in (3, 5, 2, 4)] * 2,
        "chosen": ["good" * n for n in (1, 2, 3, 1)] * 2,
        "rejected": ["bad" * n for n in (2, 1, 1, 3)] * 2,
    }
)
disable_progress_bars()


class BalancedSFT(Balanced, SFTTrainer):
    pass


class BalancedDPO(Balanced, DPOTrainer):
    pass


def own():
    model = pico("llama", vocab_size=VOCABULARY_SIZE)
    return convert(model, {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16)) for i in (0, 2)})


def native():
    return pico("olmoe", vocab_size=VOCABULARY_SIZE)


def gradients(trainer_class, folder, make, accumulation, terms=TERMS, **options):
    """Gradients of the second step, and the tokens that each layer routed in it; nothing is learned."""
    model = make()
    rows, config = (TEXTS, SFTConfig) if trainer_class is BalancedSFT else (PAIRS, DPOConfig)
    args = config(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=len(rows) // 2 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_length=64,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        router_aux_loss_coef=0.0,
        **options,
    )
    reference = {"ref_model": make()} if trainer_class is BalancedDPO else {}
    trainer = trainer_class(
        model, args=args, train_dataset=rows, processing_class=byte_tokenizer(), balance=terms, **reference
    )
    kept = Gradients(model)
    trainer.add_callback(kept)
    trainer._get_train_sampler = lambda *_, **__: SequentialSampler(rows)
    trainer.train()
    return kept.kept


@pytest.mark.parametrize("make", [own, native])
@pytest.mark.parametrize("trainer_class", [BalancedSFT, BalancedDPO])
def test_accumulation_changes_nothing(trainer_class, make, tmp_path):
    whole, split = (gradients(trainer_class, tmp_path, make, accumulation) for accumulation in (1, 4))
    without = gradients(trainer_class, tmp_path, make, 1, terms={})
    routers = [name for name in whole if name.endswith("gate.weight")]
    assert len(routers) >= 2
    for name in routers:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=1e-6)
        assert (whole[name] - without[name]).norm() > 1e-3, name


def test_checkpointing_counts_once(tmp_path):
    plain = gradients(BalancedDPO, tmp_path, own, 2, activation_checkpointing=False)
    again = gradients(BalancedDPO, tmp_path, own, 2, activation_checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6, msg=name)
