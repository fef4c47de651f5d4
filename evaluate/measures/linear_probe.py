"""The linear probe of a labelled split, trained on the rows of another."""

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.config import EvalSettings
from evaluate.measures.knn import Knn, knn_reference
from evaluate.measures.measure import Context, Measure, Splits
from evaluate.results import Findings, Items
from features.storage.column import Column
from features.storage.rows import key_hashes

HELD_OUT = 0.1
"""Share of the training rows on which the regularisation is chosen."""


class LinearProbeSettings(EvalSettings):
    """Settings of the linear probe."""

    linear_probe_rows: int = Field(default=0, ge=0)
    """Rows of `knn_reference` to which linear probes of the image features are fitted, at most; the
    splits of `knn` test them. 0 leaves them out: to converge takes minutes on a CPU."""


class LinearProbeAccuracy(Measure):
    """Accuracy of a linear classifier on frozen image features."""

    name = "linear_probe"
    title = "Linear probe"
    in_short = "A linear classifier on frozen features"
    explained = (
        "Logistic regression on the frozen image features: what an encoder knows of the classes, "
        "once a linear map may read it out."
    )
    metric = "linear_probe_top1"
    has_headline = False
    settings = LinearProbeSettings
    needs = "labels"

    def mentions(self, settings: EvalSettings) -> dict[str, Any]:  # noqa: ARG002
        """Return none: its splits are those of k-NN."""
        return {}

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return the splits of k-NN, if probes are asked for."""
        wanted = settings.of(LinearProbeSettings).linear_probe_rows
        return Knn().splits(settings, splits) if wanted else ()

    def run(self, context: Context, split: str) -> Findings:
        """Test the probe of every image encoder, which is fitted once for all splits."""
        from evaluate.embedder import complete_column

        found = Findings()
        reference = knn_reference(context.settings, context.trained)
        for name in context.image_columns:
            voters = complete_column(context.stores[reference], f"image/{name}")
            fitted = context.once((name, reference), partial(_fit, context, reference, voters))
            if fitted is None:
                found.note(
                    f"The linear probe of {name} is left out: {reference} has too few rows to hold "
                    f"some out, or only one class."
                )
                continue
            probe, number = fitted
            column = complete_column(context.stores[split], f"image/{name}")
            rows, labels = context.labelled_rows(split, column)
            predicted = np.concatenate([probe.predict(block) for block in column.blocks(rows)])
            tried = ", ".join(f"{value:g}" for value in probe.held_out)
            context.add(
                found,
                Items((predicted == labels).astype(np.int64), rows=rows[:, None]),
                task=f"linear_probe/{name}",
                dataset=split,
                metric="linear_probe_top1",
                encoders={"image": name, "text": None},
                protocol={
                    "classifier": "logistic regression, L-BFGS to a gradient of 1e-4",
                    "converged": probe.converged,
                    "vectors": "frozen features, centred, divided by their root mean square",
                    "reference": reference,
                    "reference_rows": number,
                    "regularisation": probe.regularisation,
                    "chosen": f"of {tried} on {100 * HELD_OUT:.0f} % of the reference rows, by "
                    f"hash of the key",
                    "chance": round(1 / len(probe.bias), 8),
                },
            )
        return found


def _fit(context: Context, reference: str, column: Column) -> tuple[Any, int] | None:
    from evaluate.linear_probe import fit_linear_probe

    settings, store = context.settings.of(LinearProbeSettings), context.stores[reference]
    rows, labels = context.labelled_rows(reference, column)
    # By hash of the key, so that neither choice depends on the order of the rows.
    order = np.argsort(key_hashes(store.keys()[rows], len(rows)), kind="stable")
    order = order[: settings.linear_probe_rows]
    chosen = np.sort(order)
    held_out = np.isin(chosen, order[: round(HELD_OUT * len(order))])
    rows, labels = rows[chosen], labels[chosen]
    if not held_out.any() or len(np.unique(labels)) < 2:
        return None
    features = column.rows_at(rows)
    probe = fit_linear_probe(features, labels, held_out, device=context.embedder.device)
    return probe, len(rows)
