"""What the numbers mean, in a sentence each: for the command line's help and for the report page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One number or word of a report.

    Attributes:
        name: The column of `Report.to_dataframe`, or the word of `LayerReport.verdict`.
        meaning: A sentence for a reader who does not know the theory.
        healthy: The range to expect of a good layer; "" if there is none.
    """

    name: str
    meaning: str
    healthy: str = ""


VERDICTS = (
    Term(
        "trapped",
        "The layer has correlation traps: eigenvalues that come from a few weights that are far too "
        "large, or from a mean, and that bend its tail.",
    ),
    Term(
        "over-trained",
        "alpha below 2: the tail is heavier than theory allows for a layer that generalises; it may "
        "have memorised.",
    ),
    Term(
        "random-like",
        "The layer cannot be told from a random matrix: untrained, or what it learned does not show "
        "in its spectrum. alpha says nothing.",
    ),
    Term("under-trained", "alpha above 6: the spectrum is close to that of random weights."),
    Term(
        "malformed",
        "No power law fits the tail (no fit, or D above 0.1, of a short tail 0.2): alpha says nothing "
        "about this layer.",
    ),
    Term("well-trained", "alpha from 2 to 6: the tail holds learned correlations."),
    Term(
        "critical", "alpha within 0.1 of 2: the point at which theory expects a layer to be best."
    ),
)
"""The words of `LayerReport.verdict`, the worst first."""

HEADLINES = (
    Term(
        "alpha",
        "Exponent of the power law that the largest eigenvalues follow; smaller means a heavier "
        "tail, and so more that was learned.",
        "2 to 6, best near 2",
    ),
    Term(
        "D",
        "Distance between the tail and its power law (Kolmogorov-Smirnov). Above about 0.1 alpha "
        "means little.",
        "below 0.1",
    ),
    Term("num_pl_spikes", "Number of eigenvalues in the power-law tail.", "10 or more"),
    Term(
        "ERG_gap",
        "detX_num less num_pl_spikes: whether two definitions of the tail agree. Far above zero "
        "the power law holds fewer eigenvalues than the trace-log condition, far below zero more.",
        "near 0",
    ),
    Term(
        "num_traps",
        "Eigenvalues that stand out even after the weights are shuffled: single weights or a mean "
        "that is too large, which training did not put there by learning correlations.",
        "0",
    ),
    Term(
        "alpha_weighted",
        "alpha times log10 of the largest eigenvalue (alpha-hat): compares models of one family.",
        "lower is better",
    ),
    Term("log_norm", "log10 of the squared Frobenius norm, which is norm."),
    Term("stable_rank", "Squared Frobenius norm over squared spectral norm: an effective rank."),
    Term("rand_distance", "How far the spectrum is from that of the same weights shuffled."),
    Term("warning", "What is wrong with the layer, or makes its alpha unreliable."),
)
"""The numbers to read first, in this order."""

DETAILS = (
    Term("layer_id", "Position of the layer among all matrices of the model."),
    Term("longname", "Path of the layer in the model; name is the last part of it."),
    Term("layer_type", "Kind of layer: dense, conv2d, embedding, attention, ..."),
    Term("N", "Larger dimension of the weight matrix."),
    Term("M", "Smaller dimension of the weight matrix."),
    Term("Q", "N / M."),
    Term("rf", "Number of matrices that share one spectrum: kernel positions of a convolution."),
    Term("slice_id", "Which kernel position, if they are measured one by one."),
    Term("num_evals", "Number of eigenvalues: rf times M."),
    Term("sigma", "Standard error of alpha."),
    Term("xmin", "Eigenvalue at which the power-law tail starts."),
    Term("xmax", "Largest eigenvalue of the tail."),
    Term("log_alpha_norm", "log10 of the sum of all eigenvalues to the power alpha."),
    Term(
        "trace_log",
        "Sum of the logarithms of the tail's eigenvalues, for a spectrum of mean one.",
        "near 0",
    ),
    Term(
        "detX_num",
        "Number of eigenvalues in the tail by the trace-log (ERG) condition; also num_ERG_spikes.",
    ),
    Term("detX_val", "Eigenvalue at which that tail starts."),
    Term("log_spectral_norm", "log10 of the largest eigenvalue, spectral_norm or lambda_max."),
    Term("matrix_rank", "Number of eigenvalues above rounding; rank_loss is what is missing."),
    Term("weak_rank_loss", "Number of eigenvalues below 1e-6."),
    Term("entropy", "Entropy of the spectrum: 1 if all eigenvalues are equal, 0 for a single one."),
    Term("sv_max", "Largest singular value; sv_min is the smallest."),
    Term("num_spikes", "Eigenvalues above the random (Marchenko-Pastur) bulk."),
    Term("sigma_mp", "Standard deviation of the random bulk: 1 for pure noise."),
    Term(
        "mp_softrank",
        "Edge of the random bulk over the largest eigenvalue; 1 means that nothing stands out.",
    ),
    Term("bulk_max", "Upper edge of the random bulk; bulk_min is the lower one."),
    Term("max_rand_eval", "Largest eigenvalue of the shuffled weights."),
    Term("ww_softrank", "max_rand_eval over the largest eigenvalue."),
    Term("num_traps_mean", "Traps averaged over several shuffles, with num_traps_std."),
    Term("trap_causes", "The weights or means that make the traps."),
    Term("alpha_low", "Lower end of the 95 % interval of alpha; alpha_high is the upper end."),
    Term("p_value", "Small if the tail is unlikely to be a power law."),
)
"""The other columns that have a meaning of their own."""
