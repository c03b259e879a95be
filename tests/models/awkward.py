"""Models that break engines of this kind, all of them: each part adds its own to `CASES` when it is imported."""

from tests.models import awkward_derivatives, awkward_disguises, awkward_kinds, awkward_uses
from tests.models.awkward_cases import CASES
from tests.models.awkward_sequels import SEQUELS
from tests.models.awkward_uses import Hidden

SLICE = (
    *("tied_in_three_ways", "decay_inside_the_loss", "unused_and_dead_ends", "written_into_an_activation"),
    *("views_of_views", "a_kernel_for_each_sample", "long_convolution_by_fft", "shared_over_time_and_depth"),
    *("recursion_over_a_tree", "noise_of_many_kinds", "variational_autoencoder", "samples_on_the_last_axis"),
    *("heads_folded_into_the_batch", "experts_top_two", "contrastive", "gradient_reversal", "ema_teacher"),
    *("convolutions", "rotary_attention", "spatial_transformer", "normalised_over_the_batch", "complex_spectrum"),
    *("custom_function_between_sites", "rows_moved_after_a_custom_function", "checkpointed", "batch_norm_in_training"),
    *("dropout_on_a_weight", "a_parameter_is_the_loss", "zero_initialised_branch", "several_outputs"),
    *("packed_segments", "hardest_first", "per_example_tied_and_shared", "per_example_convolution_with_dropout"),
    *("stacked_parameters_einsum", "einsum_with_odd_letters", "lstm_on_packed_sequences"),
    *("gradient_penalty", "inner_steps", "slope_along_by_duals"),
    *("parameters_of_three_precisions", "a_parameter_for_each_sample", "hashed_embedding", "a_learned_token_in_front"),
    *("embedding_negative_padding", "embedding_that_is_the_head_and_a_mean", "noise_on_a_weight", "ragged_rows"),
    *("scalars_and_an_empty_parameter", "solved_and_inverted", "singular_values"),
)
"""One for each kind, in every profile, of what is built on the engine; `test_awkward.py` holds the engine to all."""

PARTS = (awkward_uses, awkward_disguises, awkward_derivatives, awkward_kinds)

__all__ = ["CASES", "PARTS", "SEQUELS", "SLICE", "Hidden"]
