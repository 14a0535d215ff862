"""Runs inside the peer's environment: what TRL's losses of preference say of made-up answers.

    PEER/venv/bin/python benchmarks/trl_losses.py tests/train/trl_losses.json

Writes the answers' log-probabilities and, for each loss that TRL has, its values beside its
settings; `tests/train/test_preference.py` compares ours with them.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import llamafactory.train.tuner  # noqa: F401 -- repairs transformers' search for packages
import torch
import torch.nn.functional as F
import trl
from trl import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer

BETA, GAMMA, SMOOTHING = 0.3, 0.7, 0.15
HERE = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, num_processes=1)


def answers():
    """Six pairs: sums of log-probabilities of policy and reference, and lengths."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 40, (2, 6), generator=draw)
    policy, reference = (-lengths * torch.rand(2, 6, generator=draw).double() * 3 for _ in "ab")
    return policy, reference, lengths


def dpo(kind, policy, reference, smoothing=0.0):
    """Losses of DPOTrainer."""
    trainer = SimpleNamespace(
        accelerator=HERE,
        reference_free=False,
        f_divergence_type="reverse_kl",
        beta=BETA,
        label_smoothing=smoothing,
    )
    return DPOTrainer.dpo_loss(trainer, *policy, *reference, kind)[0]


def main():
    """Write the file."""
    policy, reference, lengths = answers()
    averaged = policy / lengths, reference / lengths
    cpo = SimpleNamespace(
        accelerator=HERE, alpha=0.0, beta=BETA, simpo_gamma=GAMMA, label_smoothing=0.0
    )
    cpo.loss_type = "simpo"
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(accelerator=HERE, beta=BETA), *averaged[0])
    kto = SimpleNamespace(accelerator=HERE, calculate_KL=True, loss_type="kto", beta=BETA)
    kto.desirable_weight, kto.undesirable_weight = 1.5, 0.5
    others = policy[1].flip(0), reference[1].roll(2)  # of answers that do not belong together
    judged = KTOTrainer.kto_loss(kto, *policy, others[0], *reference, others[1])
    rows = {
        "sigmoid": ({}, dpo("sigmoid", policy, reference)),
        "smoothed": (
            {"pref_loss": "sigmoid", "dpo_label_smoothing": SMOOTHING},
            dpo("sigmoid", policy, reference, SMOOTHING),
        ),
        "hinge": ({}, dpo("hinge", policy, reference)),
        "ipo": ({}, dpo("ipo", *averaged)),
        "orpo": ({}, -averaged[0][0] - odds[0]),
        "simpo": ({"simpo_gamma": GAMMA}, CPOTrainer.cpo_loss(cpo, *averaged[0])[0]),
    }
    # RewardTrainer has its loss in the middle of compute_loss, as this line
    ranked = -F.logsigmoid(policy[0] - policy[1])
    found = {
        "made_by": f"trl {trl.__version__}",
        "beta": BETA,
        "policy": policy.tolist(),
        "reference": reference.tolist(),
        "lengths": lengths.tolist(),
        "pairs": {
            name: {"keys": keys, "losses": losses.tolist()} for name, (keys, losses) in rows.items()
        },
        "kto": {
            "keys": {"kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5},
            "others": [one.tolist() for one in others],
            "kl": judged[3].item(),
            "losses": judged[0].tolist(),  # of all wanted answers, then of all unwanted
        },
        "rewards": ranked.tolist(),
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
