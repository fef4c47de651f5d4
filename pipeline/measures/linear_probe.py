"""The linear probe of a labelled split, trained on the rows of another."""

import numpy as np

from evaluate.items import Items
from evaluate.linear_probe import LinearProbe, fit_linear_probe
from evaluate.results import Result
from features.column import Column
from features.keys import key_hashes
from pipeline.embedding.rows import complete_column, feature_blocks
from pipeline.measures.context import Context

HELD_OUT = 0.1
"""Share of the training rows on which the regularisation is chosen."""


def score_linear_probe(context: Context, splits: tuple[str, ...], reference: str) -> None:
    """Fit a probe for the features of every image encoder, and test it on some splits."""
    store = context.stores[reference]
    for name in context.config.encoders.image_columns:
        column = complete_column(store, f"image/{name}")
        fitted = _fit(context, reference, column)
        if fitted is None:
            context.findings.note(
                f"The linear probe of {name} is left out: {reference} has too few rows to hold "
                f"some out, or only one class."
            )
            continue
        for split in splits:
            _score(context, split, name, reference, fitted)


def _fit(context: Context, reference: str, column: Column) -> tuple[LinearProbe, int] | None:
    settings, store = context.config.eval, context.stores[reference]
    rows, labels = context.labelled_rows(reference, column)
    # By hash of the key, so that neither choice depends on the order of the rows.
    order = np.argsort(key_hashes(store.keys()[rows], len(rows)), kind="stable")
    order = order[: settings.linear_probe_rows]
    chosen = np.sort(order)
    held_out = np.isin(chosen, order[: round(HELD_OUT * len(order))])
    rows, labels = rows[chosen], labels[chosen]
    if not held_out.any() or len(np.unique(labels)) < 2:
        return None
    features = np.concatenate(list(feature_blocks(column, rows)))
    probe = fit_linear_probe(features, labels, held_out, device=context.embedder.device)
    return probe, len(rows)


def _score(
    context: Context, split: str, name: str, reference: str, fitted: tuple[LinearProbe, int]
) -> None:
    probe, number = fitted
    column = complete_column(context.stores[split], f"image/{name}")
    rows, labels = context.labelled_rows(split, column)
    predicted = np.concatenate([probe.predict(block) for block in feature_blocks(column, rows)])
    hits = (predicted == labels).astype(np.int64)
    context.add(
        Result(
            task=f"linear_probe/{name}",
            dataset=split,
            metric="linear_probe_top1",
            value=float(hits.mean()),
            n=len(hits),
            ci95=context.interval(hits),
            encoders={"image": name, "text": None},
            protocol={
                "classifier": "logistic regression, L-BFGS to a gradient of 1e-4",
                "converged": probe.converged,
                "vectors": "frozen features, centred, divided by their root mean square",
                "reference": reference,
                "reference_rows": number,
                "regularisation": probe.regularisation,
                "chosen": f"of {', '.join(f'{value:g}' for value in probe.held_out)} on "
                f"{100 * HELD_OUT:.0f} % of the reference rows, by hash of the key",
                "chance": round(1 / len(probe.bias), 8),
            },
        ),
        rows,
        Items(hits),
    )
