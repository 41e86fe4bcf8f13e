"""Pictures: what they draw is what was logged; pixels are looked at by people."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_reg import ELRCallback, LossReweighting, NMSparsity, plots
from lightning_reg.averaging._soup_results import Candidate
from lightning_reg.noisy_labels.label_errors import LabelErrors
from lightning_reg.sparsity.nm_sparsity.report import SparsityReport, SparsityRow
from tests.toys import QUIET, Classifier, fit

pytestmark = QUIET


def drawn(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def numbers(axes):
    return {tuple(map(round, reversed(text.get_position()))): text.get_text() for text in axes.texts}


def test_a_log_is_read_as_lightning_writes_it(tmp_path):
    logger, model = CSVLogger(tmp_path, name="", version=""), Classifier()
    sparse = NMSparsity(layers="net.3", recipe="ste", log_layers=True)
    callbacks = [ELRCallback(), LossReweighting(warmup_steps=1), sparse]
    trainer = fit(model, *callbacks, logger=logger, log_every_n_steps=2)
    log = plots.read_log(trainer.log_dir)
    assert log["reg/elr/agreement"][0] == [1, 3, 5, 7]
    assert plots.read_log(tmp_path / "metrics.csv") == log
    # All of what the pictures ask for is there.
    plots.memorisation(trainer.log_dir)
    plots.weights_over_time(trainer.log_dir)
    plots.masks(sparse.report(model), trainer.log_dir)
    plots.masks_over_time(trainer.log_dir)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"^read_log: .*metrics.csv has no column `step`"):
        plots.read_log(tmp_path)


LOG = {
    "reg/elr/agreement": ([10, 20], [0.2, 0.5]),
    "reg/elr/suspects": ([10, 20], [0.6, 0.4]),
    "reg/elr_two/agreement": ([5], [0.1]),
    "reg/elr_two/suspects": ([5], [0.9]),
    "val_acc": ([15], [0.7]),
    "reg/loss_reweighting/samples": ([1, 2], [8, 8]),
    "reg/loss_reweighting/effective_samples": ([1, 2], [5, 6]),
    "reg/loss_reweighting/max_weight": ([1, 2], [2.5, 1.5]),
    "reg/nm_sparsity/flips": ([1, 2], [30, 10]),
}


def test_compared_runs_have_a_panel_for_each_metric_and_one_legend():
    other = {"val_acc": ([15, 30], [0.6, 0.8])}
    figure = plots.compared({"a": LOG, "b": other}, ["val_acc", "reg/elr/agreement"])
    first, second = figure.axes
    assert [line.get_xydata().tolist() for line in first.lines] == [[[15, 0.7]], [[15, 0.6], [30, 0.8]]]
    assert [line.get_xydata().tolist() for line in second.lines] == [[[10, 0.2], [20, 0.5]]]
    assert [axes.get_title() or axes.get_title("left") for axes in figure.axes] == ["val_acc", "reg/elr/agreement"]
    assert first.lines[0].get_linestyle() != first.lines[1].get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"^compared: `names` must have at least one"):
        plots.compared({"a": LOG}, [])


def test_interpolation_draws_each_score_over_alpha():
    curve = {"alpha": [0.0, 0.5, 1.0], "known": [0.5, 0.8, 0.9], "unknown": [0.7, 0.7, 0.3]}
    (axes,) = plots.interpolation(curve).axes
    assert drawn(axes)["unknown"] == [[0.0, 0.7], [0.5, 0.7], [1.0, 0.3]]
    assert {*drawn(axes)} == {"known", "unknown"}
    with pytest.raises(ValueError, match=r"^interpolation: `curve` must have 'alpha' and a score, got \['alpha'\]"):
        plots.interpolation({"alpha": [0.0]})


def test_quality_by_size_has_a_point_for_each_and_a_line_along_those_that_none_beats():
    points = {"small": (10.0, 0.3), "large": (1000.0, 0.5), "beaten": (2000.0, 0.4), "as small, worse": (10.0, 0.2)}
    figure = plots.quality_by_size(points, "index, kB", "MRR")
    (axes,) = figure.axes
    assert drawn(axes) == {
        "not beaten in both": [[10, 0.3], [1000, 0.5]],
        **{name: [list(point)] for name, point in points.items()},
    }
    assert len({line.get_marker() for line in axes.lines[1:]}) == 4
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("index, kB", "MRR", "log")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not beaten in both", *points]
    with pytest.raises(ValueError, match=r"^quality_by_size: `points` must have sizes above 0, at least one, got {}"):
        plots.quality_by_size({})
    with pytest.raises(ValueError, match=r"^quality_by_size: `points` must have sizes above 0"):
        plots.quality_by_size({"none": (0.0, 0.5)})


def test_memorisation_draws_agreement_suspects_and_what_is_named():
    axes = plots.memorisation(LOG, metrics=["val_acc"]).axes[0]
    assert drawn(axes) == {
        "agreement with the given label": [[10, 0.2], [20, 0.5]],
        "share of suspects": [[10, 0.6], [20, 0.4]],
        "val_acc": [[15, 0.7]],
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "share of the samples")
    assert drawn(plots.memorisation(LOG, key="elr_two").axes[0])["share of suspects"] == [[5, 0.9]]
    # Told apart without colour.
    assert len({line.get_linestyle() for line in axes.lines}) == 3


def test_a_curve_that_was_not_logged_is_named_with_those_that_were():
    with pytest.raises(KeyError, match=r"the log has no `reg/elr_plus/agreement`; it has reg/elr/agreement, .*val_acc"):
        plots.memorisation(LOG, key="elr_plus")


def test_weights_over_time():
    above, below = plots.weights_over_time(LOG).axes
    assert drawn(above) == {"in the batch": [[1, 8], [2, 8]], "effective": [[1, 5], [2, 6]]}
    assert drawn(below) == {"largest weight": [[1, 2.5], [2, 1.5]]}


def test_the_ladder_has_a_rung_for_each_candidate():
    trace = [Candidate("a", 0.9, 0.9, True), Candidate("b", 0.8, 0.95, True), Candidate("c", 0.7, 0.6, False)]
    axes = plots.soup_ladder(trace, "val_acc").axes[0]
    assert drawn(axes) == {
        "alone": [[0.9, 0], [0.8, 1], [0.7, 2]],
        "soup with it, accepted": [[0.9, 0], [0.95, 1]],
        "soup with it, refused": [[0.6, 2]],
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_xlabel() == "val_acc"
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first one tried stands first
    for unscored in ([], [Candidate("a", None, None, True)]):
        with pytest.raises(ValueError, match=r"^soup_ladder: `trace` must have scored candidates"):
            plots.soup_ladder(unscored)


def row(name, why_dense="", kept=0.5):
    return SparsityRow(name, "4 x 4", "dense" if why_dense else "2:4", why_dense, kept, 0.5, 32, 16)


def test_masks_show_sparse_layers_and_flips():
    report = SparsityReport([row("net.0", kept=0.25), row("head", why_dense="head"), row("net.2", kept=0.75)])
    above, below = plots.masks(report, LOG).axes
    assert [bar.get_width() for bar in above.patches] == [25.0, 75.0]
    assert [label.get_text() for label in above.get_yticklabels()] == ["net.0 (2:4)", "net.2 (2:4)"]
    assert drawn(below) == {"flips": [[1, 30], [2, 10]]}
    assert len(plots.masks(report).axes) == 1
    with pytest.raises(ValueError, match=r"^masks: `report` must have a sparse weight"):
        plots.masks(SparsityReport([row("head", why_dense="head")]))


def test_masks_over_time_have_a_row_for_each_layer():
    names = {"flipped/a": ([2, 4, 8], [0.5, 0.25, 0.0]), "flipped/b": ([4, 8], [0.1, 0.2])}
    names |= {"kept_magnitude/a": ([2, 4, 8], [0.5, 0.6, 0.7]), "kept_magnitude/b": ([4], [0.9])}
    figure = plots.masks_over_time({f"reg/nm_sparsity/{name}": curve for name, curve in names.items()})
    flips, kept, *bars = figure.axes
    assert [flips.get_title(loc="left"), kept.get_title(loc="left")] == [
        "Weights that changed sides, %",
        "Kept magnitude, %",
    ]
    assert [label.get_text() for label in flips.get_yticklabels()] == ["a", "b"]
    assert flips.collections[0].get_array().filled(-1).tolist() == [[50, 25, 0], [-1, 10, 20]]  # -1: not logged
    assert kept.collections[0].get_array().filled(-1).tolist() == [[50, 60, 70], [-1, 90, -1]]
    assert flips.collections[0].get_coordinates()[0, :, 0].tolist() == [1, 3, 6, 10]  # a cell around each step
    assert len(bars) == 2
    with pytest.raises(KeyError, match=r"no `reg/nm_sparsity/flipped/...`: train with NMSparsity\(log_layers=True\)"):
        plots.masks_over_time(LOG)


def errors(given, suggested):
    return LabelErrors(
        torch.arange(len(given)) + 1, torch.tensor(given), torch.tensor(suggested), torch.ones(len(given))
    )


def test_suspects_are_counted_and_the_first_ones_shown():
    images = torch.arange(5.0)[:, None, None] * torch.eye(2)
    figure = plots.suspects(errors([0, 0, 2], [1, 1, 0]), images, ["cat", "dog", "owl"], thumbnails=2)
    matrix, first, second, *empty = figure.axes
    assert numbers(matrix) == {(0, 1): "2", (2, 0): "1"}
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["cat", "dog", "owl"]
    assert first.get_title("left") == "cat → dog"
    assert first.images[0].get_array().tolist() == [[1, 0], [0, 1]]
    assert second.get_title("left") == "cat → dog"
    assert not any(axes.images for axes in empty)
    assert len(plots.suspects(errors([0, 2], [1, 0])).axes) == 1
    with pytest.raises(ValueError, match=r"^suspects: `errors` must have at least one"):
        plots.suspects(errors([], []))


def test_colour_images_have_their_channels_last():
    figure = plots.suspects(errors([0], [1]), torch.rand(2, 3, 4, 5))
    assert figure.axes[1].images[0].get_array().shape == (4, 5, 3)


def test_forgetting_leaves_out_what_was_not_tested():
    nan = float("nan")
    axes = plots.forgetting(torch.tensor([[0.9, nan], [0.0, 0.8]]), ["a", "b"]).axes[0]
    assert numbers(axes) == {(0, 0): "90", (1, 0): "0", (1, 1): "80"}
    with pytest.raises(ValueError, match=r"^forgetting: `accuracies` must be of shape \(T, T\), got \(2, 3\)"):
        plots.forgetting(torch.zeros(2, 3))


def test_guidance_has_a_curve_for_each_sample_and_the_median():
    nan = float("nan")
    axes = plots.guidance(torch.tensor([[0.5, 0.9, nan], [0.25, 0.75, 1.0], [0.75, 0.5, 0.5]]), 0.9).axes[0]
    *samples, median, threshold = [line.get_ydata() for line in axes.lines]
    assert [list(curve)[:2] for curve in samples] == [[0.5, pytest.approx(0.9)], [0.25, 0.75], [0.75, 0.5]]
    assert list(median) == [0.5, 0.75, 0.5]  # of an even number the lower one
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    assert list(threshold) == [0.9, 0.9]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["median", "threshold 0.9"]
    assert len(plots.guidance(torch.ones(1, 2)).axes[0].lines) == 2
    for odd in (torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError, match=r"^guidance: `similarity` must be of shape \(B, S\)"):
            plots.guidance(odd)


def test_corrected_masks_show_what_was_replaced_where_most_was():
    given = torch.tensor([[[0, 1], [1, 255]], [[0, 1], [1, 2]], [[0, 0], [0, 0]]])
    corrected = torch.tensor([[[0, 0], [1, 0]], [[0, 0], [0, 2]], [[0, 0], [0, 0]]])
    figure = plots.corrected_masks(torch.rand(3, 3, 2, 2), given, corrected)
    axes = figure.axes
    assert [one.get_title() or one.get_title("left") for one in axes[:2]] == ["1", "0"]
    assert len(axes) == 8
    after = torch.tensor(axes[7].images[1].get_array().filled(-1))  # the last row of the second column
    assert after.tolist() == [[-1, 0], [-1, -1]]  # pixels that are ignored were not replaced
    before = torch.tensor(axes[3].images[0].get_array().filled(-1))
    assert before.tolist() == [[0, 1], [1, -1]]
    assert len(plots.corrected_masks(torch.rand(3, 2, 2), given, corrected, columns=1).axes) == 4
    with pytest.raises(ValueError, match=r"^corrected_masks: `corrected` must differ"):
        plots.corrected_masks(torch.rand(3, 2, 2), given, given)


def test_the_style_ends_with_the_picture():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.forgetting(torch.eye(2))
    assert dict(mpl.rcParams) == before


def test_grokking_draws_what_was_logged_and_the_ratios_of_networks():
    shares = {f"reg/ipr_monitor/share_{part}": ([1, 3], values) for part, values in SHARES.items()}
    named = {f"reg/ipr_monitor/{part}_accuracy": ([1, 3], values) for part, values in ACCURACIES.items()}
    ratios = torch.tensor([0.05, 0.06, 0.99, 1.0])
    above, below, first = plots.grokking(shares | named, {"one": ratios}, bounds=(0.1, 0.6)).axes
    assert drawn(above) == {
        "test": [[1, 0.1], [3, 0.9]],
        "training, wrong labels": [[1, 0.8], [3, 0.2]],
    }
    low, high = below.collections
    assert [0.75 in low.get_paths()[0].vertices[:, 1], 0.625 in high.get_paths()[0].vertices[:, 1]] == [True, True]
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["ratio below 0.1", "ratio from 0.6"]
    assert above.get_xlim() == below.get_xlim() == (1, 3)
    assert [bar.get_height() for bar in first.patches if bar.get_height()] == [2, 2]
    assert [line.get_xdata()[0] for line in first.lines] == [0.1, 0.6]
    assert len(plots.grokking(shares).axes) == 1
    with pytest.raises(KeyError, match="the log has no `reg/ipr_monitor/share_low`"):
        plots.grokking(named)


SHARES = {"low": [1.0, 0.75], "high": [0.0, 0.375]}
ACCURACIES = {"test": [0.1, 0.9], "corrupted": [0.8, 0.2], "train": [0.5, 0.5]}
