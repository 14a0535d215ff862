"""How like generated responses are to those they are compared with: BLEU-4, ROUGE, exact match.

All scores are means over pairs, in percent, so that rows count alike whatever their length. BLEU-4
is that of sentences over characters, with NIST's smoothing (method 3 of
https://aclanthology.org/W14-3346); ROUGE-1, -2 and -L are F1 over words
(https://aclanthology.org/W04-1013). Words are found by jieba's segmentation, which serves Chinese
and leaves words of other scripts whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmray.arguments.training import GENERATED_METRICS

ROUGE = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}


def similarity(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The scores of `GENERATED_METRICS`; those of no pair at all are 0.

    Args:
        predictions: what was generated.
        labels: what each is compared with. Blanks around both are left out.
    """
    pairs = [(p.strip(), r.strip()) for p, r in zip(predictions, labels, strict=True)]
    scored = [_scores(prediction, label) for prediction, label in pairs]
    count = max(1, len(scored))
    return {
        name: round(sum(scores[name] for scores in scored) / count, 4) for name in GENERATED_METRICS
    }


def words(text: str) -> list[str]:
    """The words of a text, marks of punctuation among them, blanks left out."""
    import rjieba

    return [word for word in rjieba.cut(text) if not word.isspace()]


class _Words:
    """The form in which rouge_score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _scores(prediction: str, label: str) -> dict[str, float]:
    scores = dict.fromkeys(GENERATED_METRICS, 0.0)
    scores["exact_match"] = 100.0 * (prediction == label)
    if not prediction or not label:
        return scores
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(label)], list(prediction), smoothing_function=smoothing)
    rouge = RougeScorer(list(ROUGE), tokenizer=_Words()).score(label, prediction)
    scores |= {name: 100.0 * rouge[key].fmeasure for key, name in ROUGE.items()}
    return scores | {"bleu-4": 100.0 * bleu}
