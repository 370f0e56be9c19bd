"""The tests of the conformance suite that a variant of a backend passes in every run.

A variant replaces attention, a memory layout or a kernel of a backend that passes the whole suite.
What follows from its logits and states is the same code, so that laws of logits and states show
what the variant changes. `tests/conftest.py` leaves its other tests to the nightly run.
"""

import pytest

from treeflash.testing import BackendSuite
from treeflash.testing.pairs import EXAMPLES

FAMILIES = "qwen3", "qwen3_moe", "qwen3_sliding"
"""With experts and with windows; others differ in what variants leave as it is."""
if EXAMPLES:
    FAMILIES = *BackendSuite.families, "qwen3_sliding"
LAWS = frozenset(
    {
        # Trees, paths, windows
        "test_logits_match_reference",
        "test_depth_beyond_the_window",
        "test_verifier_cache_equals_prefill",
        "test_verifying_again_replaces_the_tree",
        "test_a_tree_that_is_not_committed_leaves_no_trace",
        "test_settings_of_the_tree_match_reference",
        "test_iterations_of_each_family_match_reference",
        # Recurrent states: commits, snapshots, forks
        "test_states_match_reference",
        "test_part_of_a_chain_can_be_committed",
        "test_texts_shorter_than_a_convolution",
        "test_a_state_is_restored_where_a_snapshot_was_taken",
        "test_snapshots_of_dropped_tokens_are_dropped",
        "test_two_prompts_in_one_pass",
        "test_a_prompt_that_was_run_before_is_forked",
        # Batches, chunks and schedules
        "test_logits_of_a_batch_equal_those_alone",
        "test_states_equal_prefills_after_forks_and_truncations",
        "test_texts_of_a_schedule_equal_texts_alone",
        "test_new_tokens_beside_trees_equal_each_alone",
        "test_a_pass_that_fails_changes_no_sequence",
        "test_pieces_equal_one_prefill",
    }
)
DRAFTING = frozenset(
    {
        "test_transitions_of_each_family_match_reference",
        "test_transitions_of_some_rows_match_reference",
        "test_drafter_cache_equals_prefill",
        "test_sliding_drafter_cache_equals_prefill",
        "test_tables_of_a_dialect_match_reference",
        "test_drafts_of_a_batch_equal_those_alone",
        "test_choices_match_reference",
        "test_iterations_match_reference",
        "test_long_contexts_match_reference",
        "test_a_window_of_the_context_matches_reference",
    }
)
"""Laws of drafters, heads and samplers, for variants that replace them too."""

BACKEND_SAMPLE = pytest.mark.sample(
    1,
    # Families, states and heads are code of a backend's own: all of them.
    test_logits_match_reference=None,
    test_nodes_see_what_plain_decoding_sees=None,
    test_states_match_reference=None,
    test_tables_of_a_dialect_match_reference=None,
    test_a_setting_is_refused_or_has_an_effect=None,
    # Commits, forks and schedules: a family of each kind
    test_verifier_cache_equals_prefill=3,
    test_drafter_cache_equals_prefill=3,
    test_states_equal_prefills_after_forks_and_truncations=2,
    test_texts_of_a_schedule_equal_texts_alone=2,
    # Whole generations: each family, each budget and sampling, each method
    test_iterations_of_each_family_match_reference=8,
    test_iterations_match_reference=6,
    test_generations_with_a_dialect_match_reference=4,
    test_every_token_has_the_log_probs_of_the_model=3,
    test_plain_decoding_goes_on_after_anything=9,
)
"""The cases of a backend that run every time."""
VARIANT_SAMPLE = pytest.mark.sample(
    1,
    test_logits_match_reference=None,
    test_verifier_cache_equals_prefill=2,
    test_iterations_match_reference=3,
    test_tables_of_a_dialect_match_reference=4,
)
"""The cases of a variant that run every time."""
