"""One-line mistakes in the product, and the tests that must notice them: `python tests/mutants.py`.

Each mutant is made in a copy of the tree, alone, and its tests are run there: killed if one fails, survived if none
does. Not part of the test suite: it takes minutes. Processes are forked from one that has imported torch, diffusers and
transformers once.

A mutant is known by a text that stands once in the product, so that code may move from file to file. Where the text is
found no more, or more than once, the script says so: give the mutant its new text, or take it out with what it guarded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("masa", "kernels", "weights")
COPIED = (*PRODUCT, "tests", "benchmarks", "docs", "examples", "pyproject.toml", "setup.py", "README.md")
SECONDS = 300  # that the tests of one mutant may take; what hangs is killed too
KILLED, SURVIVED, NOT_FOUND, NO_TESTS = "killed", "SURVIVED", "TEXT NOT FOUND", "NO SUCH TEST"


@dataclass(frozen=True)
class Mutant:
    """old: a text that stands once in the product. new: what stands there instead. tests: as pytest takes them."""

    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        """The first line that differs, as it was and as it is."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old[:70]} -> {new[:50] or '(nothing)'}"


# Tests -> mutations, each (old, new). Tests: a test module without test_ and .py, and names of its tests without test_;
# where none is named, all of the module's.
Mutations = dict[str, list[tuple[str, str]]]

SOURCE_CACHE: Mutations = {
    "source_cache a_cache_recorded_from_a_later_step_serves": [
        ("self.latents[step + 1 - self.first_step]", "self.latents[step + 1]"),
        ("return latents if given is None else given", "return latents"),
        (" and not (cache.pinned and run.first_step > cache.first_step)", ""),
    ],
    "source_cache the_seed_of_an_edit_s_noise_is_the_recorded_one": [
        ('self.settings["eta"] > 0 or not restore_setting', "not restore_setting"),
    ],
    "source_cache noise_that_a_trajectory_brings_is_kept": [
        ("(self.trajectory is None or self.trajectory.noise is None)", "(True)"),
        ('TRAJECTORY = ("latents", "context", "noise")', 'TRAJECTORY = ("latents", "context")'),
    ],
    "source_cache targets_may_start_from_latents_of_their_own": [
        (" or not torch.equal(latents[:1].cpu().float(), recorded.float())", ""),
    ],
    "source_cache what_agrees_with_the_cache_is_taken": [
        ("not torch.equal(trajectory.latents, self.trajectory.latents)", "False"),
    ],
    "source_cache what_contradicts_the_cache_is_refused": [
        ("if generator is not None and self.seeded:", "if False:"),
        ('name = "RecordQueries"\n    watches_source = True', 'name = "RecordQueries"'),
        ('name = "RecordPredictions"\n    watches_source = True', 'name = "RecordPredictions"'),
    ],
    "source_cache cached_equals_uncached[plain]": [
        ("both = {*parts, *wanted[step].get(site, ())}", "both = {*parts}"),
    ],
    "source_cache the_store_goes_by_size": [
        ("if nbytes <= SHARE * free_memory(device):", "if nbytes <= free_memory(device):"),
    ],
    "source_cache another_model_is_refused": [
        (
            'if sd.fingerprint != settings["fingerprint"]:\n        raise MasaError(\n            f"the cache',
            'if False:\n        raise MasaError(\n            f"the cache',
        ),
    ],
    "source_cache cached_maps_stand_behind_those_of_the_batch": [
        ("maps = torch.cat([maps, cached])", "maps = torch.cat([cached, maps])"),
    ],
}

RUN: Mutations = {
    "prompt_to_prompt recorded_maps_are_those_that_the_edit_makes": [
        ("own_tokens * mix.own[:, None]", "own_tokens"),
        ("own_tokens @ mix.from_source.mT", "own_tokens @ mix.from_source"),
    ],
    "prompt_to_prompt equals_the_published_controller[refine]": [
        ("mix.own[:, None, :, None].to(v.dtype) * own_v", "own_v"),
    ],
    "guidance source_and_targets_may_be_guided_by_different_scales": [
        ("uncond is None or uncond == cond or scale <= 1.0", "uncond is None or uncond == cond"),
        ("scale = source_scale if replayed and source_scale is not None else guidance_scale", "scale = guidance_scale"),
    ],
    "branches every_row_reads_the_source_of_its_half": [
        ("self.row(branch, row.halves[0]) for row in self.rows", 'self.row(branch, "cond") for row in self.rows'),
    ],
    "sampling bad_settings_are_named": [
        (" or changed.shape != x.shape", ""),
        ("if seed is not None and generator is not None:", "if False:"),
        ("not 0.0 <= eta <= 1.0", "not 0.0 <= eta"),
    ],
    "sampling results_that_are_no_numbers_are_refused": [
        ("torch.isfinite(x).all()", "torch.isfinite(x).any()"),
    ],
    "sampling edit_inverts_and_samples_with_its_schedule_and_backend": [
        (
            "generator=generator,\n        schedule=schedule,\n        tiled=tiled,\n        backend",
            "generator=generator,\n        tiled=tiled,\n        backend",
        ),
        (
            "backend=backend,\n        progress=progress,\n    )\n    return run(",
            "progress=progress,\n    )\n    return run(",
        ),
    ],
    "sampling whole_numbers_may_be_latents": [
        ("return latents.float().expand(", "return latents.expand("),
    ],
    "sampling one_edit_costs_196_rows": [
        ("Context(rows(step, equal[step])", "Context(rows(step, False)"),
    ],
    "sampling editing_a_picture_equals_the_published_loop": [
        ("run.pinned[run.steps - step][None]", "run.pinned[run.steps - step - 1][None]"),
        ("math.sqrt(a_next) * predict_x0(eps, x, a)", "math.sqrt(a) * predict_x0(eps, x, a)"),
    ],
    "sampling leaving_rows_out_changes_nothing": [
        ("last_layer = max(unet.sites", "last_layer = min(unet.sites"),
    ],
    "sampling seed_decides_the_noise": [
        ("self.generator = torch.Generator().manual_seed(self.seed)", "self.generator = torch.Generator()"),
    ],
    "sampling eta_equals_diffusers": [
        ("math.sqrt(1.0 - a_prev - sigma**2) * eps", "math.sqrt(1.0 - a_prev) * eps"),
        (" * math.sqrt(1.0 - a_t / a_prev)", ""),
    ],
    "schedule": [
        ("self.alphas_cumprod[max(timestep, 0)]", "self.alphas_cumprod[timestep]"),
        ("if self.offset not in (0, 1):", "if False:"),
    ],
    "sampling timesteps_match_the_published_ones": [
        ("stride * k + self.offset for k in", "stride * k for k in"),
    ],
    "sampling callback_sees_and_may_change_latents": [
        ("changed = changed.to(x)", "changed = x"),
    ],
    "inversion_methods guidance_has_no_say_in_a_negative_prompt_inversion": [
        ("        uncond = cond\n", "        pass\n"),
    ],
    "inversion_methods edit_friendly_noise_replays_the_source": [
        ("run.draw_noise() if run.noise is None else run.noise[step][None]", "run.draw_noise()"),
    ],
    "inversion_methods edit_friendly_equals_the_naive_loop": [
        ("return torch.cat(found[::-1])", "return torch.cat(found)"),
    ],
    "inversion_methods edit_friendly_noise_skips_12_of_50_steps": [
        ("steps * 12 // 50", "steps * 0"),
    ],
    "inversion_methods a_guided_inversion_s_source_is_replayed_under_its_guidance": [
        ('None if self.noise is None else float(self.settings["guidance_scale"])', "None"),
    ],
    "inversion_methods skipping_steps_of_pure_noise_is_refused": [
        ("if skip_steps and from_noise:", "if False:"),
    ],
    "null_text tolerance_and_learning_rate_are_the_published_ones": [
        ("return 1e-5 + 2e-5 * step", "return 2e-5 * step"),
        ("LEARNING_RATE * (1.0 - step / MAX_STEPS)", "LEARNING_RATE"),
    ],
    "sdedit strength_0_is_the_picture_through_the_autoencoder": [
        ("trajectory.latents[trajectory.steps - first_step]", "trajectory.latents[trajectory.steps]"),
    ],
    "sdedit sdedit_equals_the_naive_loop": [
        ("else _pinned_at(run, step + 1)", "else _pinned_at(run, step)"),
        ("shared=True)", "shared=False)"),
    ],
    "inversion_methods negative_prompt_source_takes_one_row_and_null_text_two": [
        ("(last and run.retraces)", "last"),
    ],
    "pipeline the_default_dtype_is_what_the_processor_multiplies": [
        ('torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32', "torch.float32"),
    ],
    "pipeline fingerprint_tells_models_apart": [
        ("for network in (self.unet, self.vae, self.text_encoder):", "for network in (self.unet,):"),
    ],
    "memory_options sampling_decodes_in_tiles": [
        ("return max(size) > LARGEST if tiled is None else tiled", "return max(size) > LARGEST"),
    ],
    "sampling a_source_alone_denoises_freely": [
        ("pinned = asked.pin_source in (None, True) and read", "pinned = asked.pin_source in (None, True)"),
        ("asked.pin_source in (None, True) and read", "asked.pin_source in (None, True)"),
    ],
    "sampling arguments_that_agree_with_the_trajectory_are_taken": [
        ('"width": (width, size[1])', '"width": (width, size[0])'),
        ('"schedule": (schedule, trajectory.schedule)', '"schedule": (schedule, sd.schedule)'),
    ],
    "sampling an_unguided_inversion_costs_one_row_a_step": [
        ("guided=guidance_scale > 1.0 and differ", "guided=differ"),
    ],
    "sampling what_controls_set_may_depend_on_the_pictures_size": [
        ("return fitted.shape[2], fitted.shape[3]", "return fitted.shape[2], fitted.shape[2]"),
    ],
    "inversion_methods skipping_steps_changes_the_edit": [
        ("usual = 0 if trajectory is None else trajectory.skip_steps", "usual = 0"),
    ],
    "null_text a_loss_that_is_low_enough_ends_a_step": [
        ("if loss < tolerance(step):", "if False:"),
    ],
    "inversion_methods computing_activations_again_changes_nothing": [
        ("checkpoint = pivot[0, 0].numel() > KEPT", "checkpoint = False"),
    ],
    "inversion_methods trajectories_come_back_whole": [
        ('tensors.get("noise"))', "None)"),
        ('tensors.get("context"),', "None,"),
    ],
    "plots a_pinned_source_predicts_the_picture": [
        ("_pinned_at(run, run.steps)).to(x.device)", "_pinned_at(run, step)).to(x.device)"),
        ("_pinned_at(run, run.steps)).to", "_pinned_at(run, step)).to"),
    ],
    "source_cache a_cached_source_serves_parts": [
        ("first[row] for row in (*rows, *cached)", "first[row] for row in rows"),
    ],
    "memory_options inversions_encode_in_tiles": [
        ("width=picture.shape[3], tiled=tiled)", "width=picture.shape[3])"),
    ],
    "sdedit controls_choose_among_the_steps_that_blending_leaves": [
        ("_begin(control, replace(run, first_step=first_step))", "_begin(control, run)"),
    ],
    "attention a_backend_asked_for_by_name_is_used_everywhere": [
        ('if edit is PLAIN and call.backend == "auto":', "if edit is PLAIN:"),
    ],
    "plots recording_changes_nothing": [
        ("if edit.records:  # of masked", "if False:  # of masked"),
    ],
    "pipeline emulated_dtypes_are_warned_about": [
        ("not (chosen == torch.bfloat16 and cpu_has_bf16())", "chosen != torch.bfloat16"),
    ],
}

GUIDANCE_AND_SAMPLERS: Mutations = {
    "guidance a_source_that_replays_its_noise_is_the_same_under_every_rule": [
        ("not settings.pin_source or step == steps - 1", "not settings.pin_source"),
        ("source_guided=replayed", "source_guided=False"),
        ("of_branch = ClassifierFree() if replayed else rule", "of_branch = rule"),
    ],
    "guidance a_replayed_source_keeps_plain_guidance_of_its_own_scale": [
        ("not (replayed or rule.guides(step))", "False"),
    ],
    "guidance outside_its_interval_the_unconditional_rows_are_not_computed": [
        ("both = guided and rule.guides(step)", "both = guided"),
        ("self.start <= step < self.end", "self.start <= step <= self.end"),
    ],
    "guidance an_interval_within_another_is_the_steps_of_both": [
        ("step < self.end and self.within.guides(step)", "step < self.end"),
    ],
    "guidance rescaled_guidance_equals_diffusers": [
        ("cond.std() / guided.std()", "guided.std() / cond.std()"),
        ("(1.0 - self.phi) * guided", "guided"),
    ],
    "samplers whole_trajectories_equal_diffusers": [
        ("FEW_STEPS = 15", "FEW_STEPS = 14"),
        ("h / (2.0 * h_before)", "h_before / (2.0 * h)"),
        ("math.exp(-h) * x", "x"),
        ("last and self.levels.steps < FEW_STEPS", "last"),
        ("min(self.order, self.levels.steps - step, len(known))", "min(self.order, len(known))"),
        ("weights[-1] * (m - history[0])", "weights[-1] * (history[0] - m)"),
        ("math.factorial(j) * g / phi", "g / phi"),
        ("[0.5] if q == 2 else _weights(h, r)", "_weights(h, r)"),
        ("[new - old for new, old in", "[new for new, old in"),
        ('1.0 if self.spacing == "leading" else math.sqrt(1.0 - levels.alphas[0])', "1.0"),
        ("ddim_sigma(a, a_next, eta=1.0)", "ddim_sigma(a, a_next, eta=0.9)"),
        ("TIME_SCALE = 10.0", "TIME_SCALE = 1.0"),
        ("c_skip * x + c_out * x0", "x0"),
    ],
    "samplers grids_equal_diffusers": [
        ("training // (steps + 1)", "training // steps"),
        ("KARRAS_RHO = 7.0", "KARRAS_RHO = 6.0"),
        ("low + min(max(share, 0.0), 1.0)", "low"),
        ("trained[TRAINED_STEPS * k // steps]", "trained[TRAINED_STEPS // steps * k]"),
        ("np.linspace(0, last, steps)", "np.linspace(0, last, steps + 1)[1:]"),
    ],
    "samplers leading_timesteps_have_the_schedules_offset": [
        ("stride * k + schedule.offset", "stride * k + 1"),
    ],
    "samplers a_pinned_source_has_no_history": [
        ("x0[:1] if run.pinned is not None and run.solver.keeps_history else moved[:1]", "moved[:1]"),
    ],
    "samplers a_pictures_cache_serves_it a_cached_source_serves_it": [
        ("self.predictions[step - self.first_step]", "self.predictions[step]"),
        ("run.cache.predicted(step) if run.cache is not None else", "run.cache.source_after(step) if run.cache else"),
    ],
    "samplers blended_latents_blend_the_history_with_the_clean_picture": [
        ("return self._put_back(history, self.source)", "return history"),
    ],
    "samplers local_blend_blends_the_history_alike": [
        ("history if self.local_blend is None else self.local_blend.blend(history)", "history"),
    ],
    "samplers what_is_put_back_goes_on_as_the_source_does": [
        ("history = tuple(control.blend(kept) for kept in history)", "pass"),
    ],
    "samplers controls_see_the_samplers_levels": [
        ("alphas=(*levels.alphas[:-1], 1.0)", "alphas=levels.alphas"),
    ],
    "samplers noise_that_is_no_inversion_needs_not_be_retraced": [
        ('method not in (None, "noise") and free', "method is not None and free"),
    ],
    "samplers a_cached_source_serves_starts_of_ones_own": [
        ("self.latents[:1] if given is None else given", "self.latents[:1]"),
    ],
    "lcm guidance_changes_the_picture_and_costs_no_rows": [
        ("max(settings.guidance_scale, source_scale) > 1.0 and not sd.embeds_guidance", "True"),
        ("guidance=run.embedded_guidance,", ""),
    ],
    "lcm the_embedding_is_diffusers": [
        ("1000.0 * (guidance_scale - 1.0)", "1000.0 * guidance_scale"),
        ("device=like.device) / (half - 1)", "device=like.device) / half"),
    ],
    "lcm an_inversion_is_told_its_guidance": [
        ("            guidance=embedded,\n        )", "        )"),
    ],
    "lcm what_needs_two_halves_is_refused": [
        ("if guidance not in (None, ClassifierFree()):", "if False:"),
    ],
    "lcm a_controlnet_has_no_place_for_guidance": [
        ("UNet(replace(config, guidance_width=0))", "UNet(config)"),
    ],
    "taesd every_layout_equals_diffusers": [
        ("self.encoder((picture + 1.0) / 2.0)", "self.encoder(picture)"),
        ("LATENTS_BEYOND = 3.0", "LATENTS_BEYOND = 4.0"),
        ('number -= coder == "decoder" and not layers', "number -= not layers"),
        ("(key, entry.stored or key)", "(key, key)"),
    ],
    "live_preview the_result_is_the_same_to_the_bit": [
        (
            "controls=tuple(control for control in asked.controls if not only_looks(control))",
            "controls=asked.controls",
        ),
    ],
    "live_preview every_so_many_steps_and_the_last": [
        ("(step - self.first) % self.control.every == 0", "step % self.control.every == 0"),
        (" or step == self.last", ""),
    ],
    "live_preview a_models_own_factors_are_used_and_shipped_with_the_demo_model": [
        ("run.preview or SD_V1_FACTORS", "SD_V1_FACTORS"),
    ],
    "registration older_caches_serve": [
        ('{"sampler": DDIM(), "guidance": ClassifierFree()}.get(name)', "None"),
    ],
    "registration a_schedule_of_ones_own_holds_for_the_edit_too": [
        ("own = None if type(schedule) is Schedule else schedule", "own = None"),
        ("check_kept(schedule=self.schedule)", "pass"),
    ],
    "registration derived_fields_are_not_given_twice": [
        ("for f in fields(value) if f.init", "for f in fields(value)"),
    ],
}

ROUND_TRIPS: Mutations = {
    "result an_edit_runs_again_with_what_is_not_the_default": [
        ('schedule=restore_schedule(settings["schedule"]),\n        tiled', "tiled"),
        ('guidance_scale=settings["guidance_scale"],\n        method', "method"),
        *(
            (
                "for f in fields(cls) if f.name in settings",
                f"for f in fields(cls) if f.name in settings.keys() - {{{name!r}}}",
            )
            for name in ("pin_source", "negative_prompt", "eta", "targets_at_once", "skip_steps", "guidance_scale")
        ),
    ],
    "result settings_are_json_and_come_back": [
        (', "skip": value.skip}', "}"),
    ],
    "result every_kind_of_start_runs_again": [
        ("whole.float() if whole.dtype == torch.bfloat16 else whole", "whole"),
        (
            "getattr(self, f.name)) for f in fields(self)",
            "getattr(self, f.name)) for f in fields(self) if f.name != 'latents'",
        ),
        (
            "getattr(self, f.name)) for f in fields(self)",
            "getattr(self, f.name)) for f in fields(self) if f.name != 'generator_state'",
        ),
        (
            "for f in fields(cls) if f.name in settings",
            'for f in fields(cls) if f.name in settings.keys() - {"latents"}',
        ),
        ("generator.set_state(unpack(state))", "pass"),
    ],
    "result large_maps_are_saved_in_half_precision": [
        ("tensor.is_floating_point() and tensor.numel() > BIG", "tensor.numel() > BIG"),
    ],
    "result an_older_results_further_targets_are_removed": [
        ("[1 + targets : -2]", "[2 + targets : -2]"),
    ],
    "result an_edit_runs_again_from_its_picture": [
        ("if file_digest(found) != digest:", "if False:"),
    ],
    "result other_weights_are_noticed": [
        (
            'if sd.fingerprint != settings["fingerprint"]:\n        raise MasaError(\n            f"{settings[',
            'if False:\n        raise MasaError(\n            f"{settings[',
        ),
    ],
    "result large_settings_survive_in_the_picture": [
        ('while (name := f"{KEY}.{len(pieces)}") in texts:', 'while (name := f"{KEY}.{len(pieces)}") is None:'),
    ],
    "result schedule_and_backend_run_again": [
        (
            "getattr(self, f.name)) for f in fields(self)",
            "getattr(self, f.name)) for f in fields(self) if f.name != 'schedule'",
        ),
        (
            "getattr(self, f.name)) for f in fields(self)",
            "getattr(self, f.name)) for f in fields(self) if f.name != 'backend'",
        ),
        ("for f in fields(cls) if f.name in settings", 'for f in fields(cls) if f.name in {*settings} - {"schedule"}'),
        ("for f in fields(cls) if f.name in settings", 'for f in fields(cls) if f.name in {*settings} - {"backend"}'),
    ],
    "result a_callback_is_told": [
        ('if settings["callback"]:', "if False:"),
    ],
    "result a_relative_picture_is_found_from_elsewhere": [
        ("(Path(), *Path(near).resolve().parents)", "(Path(),)"),
    ],
    "result another_device_or_dtype_keeps_the_checks": [
        ("if str(sd.dtype) != f\"torch.{settings['dtype']}\":", "if False:"),
    ],
    "result pictures_are_saved_together_or_not_at_all": [
        ("picture.save(stage / name)", "picture.save(folder / name)"),
    ],
    "result what_is_no_saved_result_is_named": [
        ('!= settings | {"branch": branch}:', "is None:"),
    ],
    "result a_saved_result_comes_back_whole": [
        ("return int(layer), int(step)", "return int(step), int(layer)"),
    ],
    "memory_options a_gpu_s_run_that_was_offloaded_and_compiled_is_compiled_on_a_cpu": [
        ("and not ((compiler or loras) and", "and not (False and"),
    ],
    "null_text inner_steps_are_repeated_from_the_settings": [
        ('settings.get("inner_steps") or INNER_STEPS', "INNER_STEPS"),
    ],
}

CONTROLS: Mutations = {
    "prompt_to_prompt recorded_maps_are_those_that_the_edit_makes": [
        ("own[branch - 1, list(positions)] *= factor", "own[branch - 1, list(positions)] *= 1.0"),
        ("from_source[branch - 1][:, list(positions)] *= factor", "from_source[branch - 1][:, list(positions)] *= 1.0"),
    ],
    "prompt_to_prompt equals_the_published_controller": [
        ("schedule[:, branch - 1, list(positions)] = 0.0", "pass"),
        (
            'branches.row(branch, "cond") for branch in branches.targets',
            'branches.row(branch, "uncond") for branch in branches.targets',
        ),
        ("int(fraction * len(schedule))", "int(fraction * run.steps)"),
    ],
    "prompt_to_prompt equals_the_published_controller[refine]": [
        ("range(int(run.steps * start), int(run.steps * end))", "range(0, int(run.steps * end))"),
        ("if step in self.own_steps else None", "if False else None"),
    ],
    "prompt_to_prompt self_attention_reaches_half_the_latents_side_at_any_size": [
        ("math.prod(run.grid) // 4 if", "math.prod(run.grid) // 16 if"),
    ],
    "masks word_masks_are_those_of_this_step_or_of_the_last": [
        ("self.previous = maps[[", "self.previous = self.previous if self.previous is not None else maps[["),
        ("normalise(self.previous)[0] >= self.threshold", "normalise(self.previous)[0] > self.threshold"),
        ("self.map_grid), grid) >= self.threshold", "self.map_grid), grid) > self.threshold"),
    ],
    "masks a_row_whose_source_has_no_map_sees_every_key": [
        (" | constant[source]", ""),
    ],
    "masks a_given_mask_counts_from_one_half_on": [
        ("region = rows >= SOURCE_THRESHOLD", "region = rows > SOURCE_THRESHOLD"),
        ("(load_mask(self.source) >= SOURCE_THRESHOLD)", "(load_mask(self.source) > SOURCE_THRESHOLD)"),
    ],
    "masks a_mask_of_any_shape_covers_the_picture given_masks_are_resized_to_every_grid": [
        ('size=size, mode="nearest")[:, 0]', 'size=size[::-1], mode="nearest")[:, 0]'),
    ],
    "masks a_mask_of_any_shape_covers_the_picture": [
        ("self.by_grid[max(self.by_grid)]", "self.by_grid[min(self.by_grid)]"),
    ],
    "masks source_masks_are_cut_and_target_masks_may_be_soft": [
        ("queries = (rows if self.soft else region)", "queries = (region)"),
    ],
    "masks source_weight_matters_in_a_union": [
        ("weight=float(self.control.source_weight)", "weight=1.0"),
    ],
    "masks normalise_spans_0_to_1_and_finds_constant_maps": [
        ("(maps - low) / torch.where", "maps / torch.where"),
    ],
    "token_alignment of_equally_good_alignments_the_targets_end_is_left_out_first": [
        ("if score[i][j] == score[i][j - 1]:", "if score[i][j] == score[i][j - 1] != score[i - 1][j]:"),
    ],
    "token_alignment only_equal_tokens_are_paired refinement_equals_the_published_alignment": [
        ("(1 if source[i - 1] == target[j - 1] else -1)", "(1 if source[i - 1] == target[j - 1] else 1)"),
    ],
    "token_alignment replacement_equals_the_published_walk": [
        ("= 1.0 / len(theirs)", "= 1.0"),
    ],
    "token_alignment a_shorter_target_takes_no_word_for_its_padding": [
        ("range(max(len(source.ids), len(target.ids)), tokens)", "range(len(target.ids), tokens)"),
    ],
    "local_blend equals_the_published_blend outside_its_mask_the_target_is_the_source": [
        ("return region | region[:1]", "return region"),
        ("maps if self.sum is None else self.sum + maps", "maps"),
        ("region & ~self._region(", "region & self._region("),
        ("if step < self.first_blended:", "if step <= self.first_blended:"),
    ],
    "sdedit blending_equals_the_naive_loop": [
        ("background = self.noised(self.alphas[step + 1])", "background = self.noised(self.alphas[step])"),
        ("max(run.first_step, int(self.skip * run.steps))", "run.first_step"),
    ],
    "plug_and_play equals_the_published_arithmetic both_settings_matter": [
        ("s.layer >= FIRST_ATTENTION_LAYER", "s.layer > FIRST_ATTENTION_LAYER"),
        ("if step < self.feature_steps:", "if step <= self.feature_steps:"),
    ],
    "style equals_the_formula": [
        (
            "return dict.fromkeys(self.sites, Edit(q_from=branches.source_rows, k_from=branches.source_rows))",
            "return dict.fromkeys(self.sites, Edit(k_from=branches.source_rows))",
        ),
    ],
    "plots maps_are_the_probabilities words_add_up_their_tokens": [
        ("self.sums[kind] + mean if kind in self.sums else mean", "mean"),
        ('means["self"].mT.unflatten', 'means["self"].unflatten'),
    ],
    "sampling edit_refuses_before_inverting": [
        (" & set(range(run.first_step, run.steps))", ""),
    ],
    "sampling controls_at_odds_in_a_late_step_are_refused_before_the_first": [
        ("if index in merged and field in merged[index].claims():", "if False:"),
    ],
    "sampling equals_the_published_loop[lists]": [
        ('site.kind == "self" and site.layer in layers)\n        mask =', "site.layer in layers)\n        mask ="),
    ],
    "plots maps_are_the_probabilities": [
        ("total / self.steps for kind", "total for kind"),
    ],
    "plots by_default_queries_are_few": [
        ("for layer in sorted(up, reverse=True)}", "for layer in sorted(up)}"),
        ("round(n * (len(items) - 1) / max(1, count - 1))", "n"),
    ],
    "plots queries_are_the_networks": [
        ('rearrange(queries, "b h n d -> b n (h d)")', 'rearrange(queries, "b h n d -> b n (d h)")'),
    ],
    "masks every_setting_of_word_masks_matters": [
        ("self.source if branch == SOURCE or not run.targets_known else self.target", "self.target"),
        (
            "site.downsample == MAP_DOWNSAMPLE and site.layer < max(layers)",
            "site.downsample == MAP_DOWNSAMPLE and site.layer < 1",
        ),
    ],
    "masks word_masks_are_kept_per_step": [
        (
            "if masks is not None:\n                self.used[step] = masks",
            "if masks is not None:\n                self.used[0] = masks",
        ),
    ],
    "image masks_of_every_kind": [
        ("x.dtype == torch.uint8 and x.numel() and int(x.max()) > 1", "x.dtype == torch.uint8 and x.numel()"),
    ],
    "prompt_to_prompt words_of_one_target_need_not_be_in_the_others": [
        (
            "if not found:\n        raise errors[0]\n    return found",
            "if errors:\n        raise errors[0]\n    return found",
        ),
    ],
    "local_blend every_target_needs_a_word": [
        ("if not weights[branch, i].any():", "if False:"),
    ],
    "plug_and_play a_control_that_selects_nothing_is_refused": [
        (
            "max(feature_steps, attention_steps) <= run.first_step",
            "max(feature_steps, attention_steps) < run.first_step",
        ),
    ],
}

MODELS: Mutations = {
    "unet features_are_those_of_the_row_s_own_timestep": [
        ("F.silu(emb_of(emb, read))", "F.silu(emb)"),
    ],
    "unet rows_that_stay_keep_their_timesteps": [
        ("self.emb, self.context = emb_of(self.emb, staying), take(", "self.context = take("),
        (" or (retire is not None and retire.layer == 0)", ""),
    ],
    "unet copies_are_computed_once_until_the_prompt_is_read": [
        ("self.emb, self.copies = emb_of(self.emb, self.copies), None", "self.copies = None"),
    ],
    "unet timestep_embedding_has_cosines_first": [
        ("torch.cat([angles.cos(), angles.sin()]", "torch.cat([angles.sin(), angles.cos()]"),
    ],
    "unet equals_diffusers": [
        ("(self.conv_shortcut(before) if self.has_shortcut else before) + x", "x"),
        ("return x * F.gelu(gate)", "return x * F.silu(gate)"),
    ],
    "unet norm_eps_are_the_checkpoints": [
        ("GroupNorm(norm_groups, width, eps=1e-6)", "GroupNorm(norm_groups, width, eps=1e-5)"),
    ],
    "unet rows_retire_where_nothing_more_is_read_of_them": [
        ("if staying is not None and self._self_attention_is_last_read(call):", "if False:"),
    ],
    "unet retired_rows_do_not_change_the_others": [
        (" and call.edit_at(self.attn2.site) is PLAIN", ""),
    ],
    "unet residual_sites_name_the_layer_that_follows": [
        (
            '.norm", place, level)\n                    layer += 1',
            '.norm", place, level)\n                    layer += 0',
        ),
    ],
    "unet rows_that_do_not_fit_are_refused": [
        (" or any(not 0 <= r < len(x) for r in copies or ())", ""),
    ],
    "attention masks_are_planned_once_per_forward": [
        ("key = (id(mask), grid, len(self.tape))", "key = (id(mask), grid)"),
    ],
    "attention rows_read_what_the_edit_says": [
        ("first.rows if edit.parts else edit.v_from or tuple(range(rows))", "first.rows"),
    ],
    "attention keys_and_values_of_different_rows_are_not_masked_or_united": [
        ("not (fused and k_index == v_index)", "not fused"),
    ],
    "vae the_log_variance_is_kept_between_minus_30_and_20": [
        ("logvar.clamp(-30.0, 20.0)", "logvar"),
    ],
    "vae equals_diffusers": [
        ("latents / self.config.scaling_factor", "latents"),
        ("F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x", "F.pad(x, (1, 0, 1, 0)) if self.asymmetric else x"),
    ],
    "rowwise the_results_are_torch_s": [
        (
            "(self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)",
            "(self.kernel_size, self.padding, self.groups) == ((1, 1), (0, 0), 1)",
        ),
    ],
    "rowwise it_applies_where_it_serves": [
        ("torch.compiler.is_compiling() or torch.is_grad_enabled()", "torch.compiler.is_compiling()"),
    ],
    "tiling a_tile_s_share_falls_linearly_to_its_borders": [
        ("* _ramp(out.shape[-1], out)", "* torch.ones_like(_ramp(out.shape[-1], out))"),
        ("_ramp(out.shape[-2], out)[:, None]", "torch.ones_like(_ramp(out.shape[-2], out))[:, None]"),
        ("length - 1 - place) + 1", "length - 1 - place) + 2"),
    ],
    "tiling tiles_cover_and_overlap": [
        ("// step * step for i in range(count)", "for i in range(count)"),
        ("math.ceil((length - overlap) / (tile - overlap))", "math.ceil(length / tile)"),
    ],
    "tokenizer tokenizer_json_has_its_own_padding_too": [
        ("return cls(vocab, merges, pad)", "return cls(vocab, merges)"),
    ],
    "tokenizer a_small_vocabulary_with_its_own_padding": [
        ('"merges.txt"), pad)', '"merges.txt"))'),
    ],
    "tokenizer token_positions": [
        ("start < span_end and end > span_start for", "start <= span_end and end > span_start for"),
    ],
    "tokenizer a_prompt_of_exactly_75_tokens_is_whole": [
        ("room = self.length - 2\n            if", "room = self.length - 3\n            if"),
    ],
    "winograd is_the_convolution the_size_of_a_pass_changes_nothing_but_rounding": [
        ("above, below = TILE * top - 1,", "above, below = TILE * top,"),
        ("if some.start == 0:", "if True:"),
        ("begin, end = max(0, above), min(height, below)", "begin, end = max(0, above), min(height, below - 1)"),
    ],
    "winograd what_a_norm_gave_others_is_not_written_over": [
        (" and not norm._forward_hooks", ""),
    ],
    "winograd a_module_that_was_changed_does_as_it_was_told": [
        ('if self.padding_mode != "zeros" or (', "if ("),
    ],
    "tokenizer a_long_prompt_is_cut_with_a_warning_that_names_the_rest": [
        ("dropped = prompt[spans[room][0] :]", "dropped = prompt[spans[room][1] :]"),
    ],
    "tokenizer a_word_beyond_the_cut_is_said_to_be_cut": [
        ("if position <= room]", "if position]"),
    ],
    "tokenizer ids_equal_transformers": [
        ('Replace(Regex(r"\\s+"), " "), Lowercase()', 'Replace(Regex(r"\\s+"), " ")'),
    ],
    "unet sites_are_the_published_layers": [
        ('"up", level, i))', '"up", level + 1, i))'),
    ],
}

KERNELS_AND_WEIGHTS: Mutations = {
    "kernels_cross_attention_maps gradients_flow_through_both_results": [
        (
            "cross_attention_with_maps_sdpa(q, k, v, token_weights, ctx.scale)",
            "cross_attention_with_maps_sdpa(q, k, v, token_weights)",
        ),
    ],
    "kernels_cross_attention_maps sdpa_is_as_exact_as_torch": [
        (".to(wide).mean(1).mT", ".to(wide).sum(1).mT"),
    ],
    "kernels_mutual_attention plan_keeps_weights_between_0_and_1": [
        ("query_weight.float().clamp(0, 1)", "query_weight.float()"),
    ],
    "kernels_mutual_attention plan_knows_binary_weights": [
        ("((weight == 0) | (weight == 1)).all()", "((weight == 0) | (weight == 1)).any()"),
    ],
    "kernels_mutual_attention every_path_is_as_exact_as_torch": [
        ("full | region.all(1, keepdim=True), every", "full, every"),
        (
            "foreground, background = attend(weight > 0), attend(weight == 1)",
            "foreground, background = attend(weight > 0), attend(weight > 0)",
        ),
        ("torch.where(count == 0, 0.0, weight)", "weight"),
        ("plan.query_weight[row].index_select(0, order[soft])", "plan.query_weight[row][soft]"),
        ("logits = logits + math.log(source_weight)", "logits = logits"),
    ],
    "kernels_mutual_attention blending_rounds_once": [
        ("torch.promote_types(foreground.dtype, torch.float32)", "foreground.dtype"),
    ],
    "kernels_mutual_attention source_weight_counts_source_keys_repeatedly": [
        ("bias[..., :first] = math.log(source_weight)", "bias[..., :first] = source_weight"),
    ],
    "kernels_mutual_attention masactrl_rows_copy_nothing": [
        ("step > 0 and values ==", "False and values =="),
    ],
    "kernels_mutual_attention rows_packed_in_an_integer": [
        ("value - (1 << 64) if value >= 1 << 63 else value", "value"),
    ],
    "kernels_mutual_attention rows_of_any_pattern": [
        ("if step < 1 or any(", "if any("),
    ],
    "kernels_mutual_attention triton_asked_for_by_name_does_not_fall_back": [
        ("if width % 8 or not 8", "if not 8"),
    ],
    "kernels_mutual_attention full_rows_are_plain": [
        ("whole[row]:", "False:"),
    ],
    "model_files heads_are_read_from_the_settings": [
        ('heads = settings.get("num_attention_heads") or ', "heads = "),
    ],
    "model_files settings_are_read": [
        ('text_json.get("num_attention_heads"),', "None,"),
        ('settings.get("num_train_timesteps", base.training_timesteps)', "base.training_timesteps"),
    ],
    "model_files another_autoencoder_may_be_a_folder settings_that_the_models_do_not_compute_are_refused": [
        ("found = settings.get(key, value)", "found = value"),
    ],
    "layouts": [
        ("after = 1 if level == 0 else 2", "after = 2"),
        ('levels - 1 - level if place == "up" else level', "level"),
    ],
    "model_files parts_of_different_models_are_refused": [
        ("if config.text.width != config.unet.context_width:", "if False:"),
    ],
    "kernels_mutual_attention what_triton_does_not_serve": [
        ("if programs > MAX_PROGRAMS:", "if False:"),
        ("if tensor.shape[2] * token > MAX_SPAN:", "if False:"),
    ],
    "kernels_mutual_attention split_width_covers_every_served_head": [
        ("max(16, 1 << (width - low - 1).bit_length())", "1 << (width - low - 1).bit_length()"),
    ],
    "detect": [
        ("if len(shape) == 4 and shape[1] != 4:", "if False:"),
        ("if width in OTHER_CONTEXTS:", "if False:"),
        ("Counter(found).most_common(1)[0][0] if found else default", "found[0] if found else default"),
    ],
}

FILES_AND_COMMANDS: Mutations = {
    "image": [
        ("round(length * scale) // MULTIPLE * MULTIPLE", "int(length * scale) // MULTIPLE * MULTIPLE"),
        ("+ 1.0) * 127.5).round()", "+ 1.0) * 127.5)"),
        ("ImageOps.exif_transpose(picture)", "picture"),
    ],
    "files": [
        ("temporary.unlink(missing_ok=True)", "pass"),
    ],
    "offload_on_cpu a_changed_unet_is_not_thrown_away": [
        ("if WeightDigest.of(unet) != self.digests[0] or any(", "if any("),
    ],
    "compile the_oldest_captures_are_dropped captures_are_dropped_with_the_weights_they_read": [
        ("while len(self.captured) >= MOST_GRAPHS:", "while False:"),
        ("if self.places != self._places():", "if False:"),
    ],
    "cli edit_equals_the_library": [
        ("**given(threshold=args.threshold)", ""),
    ],
    "cli options_describe_controls": [
        ("cross_replace_steps=args.cross_steps, ", ""),
    ],
    "cli number_lists": [
        ("int(last or first) + 1", "int(last or first)"),
    ],
    "cli options_describe_recorders": [
        ("RecordQueries(layers, steps)", "RecordQueries(layers)"),
    ],
    "idle_options": [
        ("if is_given(args, option) and not set(owners) & set(names):", "if False:"),
    ],
    "sheets a_sweep_synthesises_every_pair a_sweep_over_a_picture_inverts_once": [
        ("{**fixed, **of_sampling,", "{**of_sampling, **fixed,"),
    ],
    "sdedit sdedit_equals_the_naive_loop": [
        ("round(strength * steps)", "int(strength * steps) - 1"),
    ],
    "cli every_option_reaches_the_library": [
        ("for name in names if OPTIONS.get(name, name) in args", 'for name in names if name in args and name != "eta"'),
        ('"pin_source": not args.free_source', '"pin_source": True'),
        ('"backend": args.backend,', ""),
        ("edit_guidance_scale=args.edit_guidance,", ""),
        ("tokenizer=args.tokenizer,\n        vae=args.vae,\n        lora", "vae=args.vae,\n        lora"),
        ("vae=args.vae,\n        lora=args.lora,", "vae=args.vae,"),
        ("image=args.image,\n        control", "control"),
        ('{"pin_source": not args.free_source}', '{"pin_source": args.free_source}'),
        ("OPTIONS.get(name, name) in args}", 'OPTIONS.get(name, name) in args and name != "eta"}'),
    ],
    "cli a_rerun_s_options_reach_the_library": [
        (
            "dtype=args.dtype,\n        vae=args.vae,\n        tokenizer=args.tokenizer,\n        progress",
            "vae=args.vae,\n        tokenizer=args.tokenizer,\n        progress",
        ),
    ],
    "cli next_free_folder": [
        ("max(used, default=0) + 1:04d", "len(used) + 1:04d"),
    ],
    "cli nothing_is_overwritten_unasked": [
        ("if taken and not overwrite:", "if False:"),
    ],
    "files permissions_are_the_users_own": [
        ("temporary.chmod(mode)", "pass"),
    ],
    "offload_on_cpu files_that_are_not_as_they_were_are_refused": [
        ("if WeightDigest.of(network) != self.digests[self._place(network)]:", "if False:"),
    ],
    "compile structures_compare_without_tensors": [
        ("return Slot(len(tensors) - 1)", "return Slot(0)"),
    ],
}


SEAMS: Mutations = {
    "attention_over_parts every_form_equals_the_scores_written_out": [
        ("logs = number_tensor(tuple(math.log(part.weight[row])", "logs = number_tensor(tuple(part.weight[row] - 1.0"),
        ("bias = bias.masked_fill(~pick_rows(part.visible, rows), -math.inf)", "pass"),
        ("pick_rows(part.v, _at(part.v_rows, rows))", "pick_rows(part.v, _at(part.k_rows, rows))"),
        ("(k * pick_rows(part.gain, rows) + pick_rows(part.offset, rows))", "(k * pick_rows(part.gain, rows))"),
    ],
    "attention_over_parts contrast_spreads_probabilities_around_their_mean": [
        ("(bias > -math.inf).sum(-1, keepdim=True)", "k.shape[2]"),
        (".clamp(0.0, 1.0))", ")"),
    ],
    "attention_over_parts a_part_without_a_visible_key_is_left_out": [
        ("out.masked_fill((bias == -math.inf).all(-1, keepdim=True), 0.0)", "out"),
    ],
    "attention keys_and_values_of_two_rows_go_through_every_form": [
        ("part.rows if edit.parts else edit.v_from or tuple(range(rows))", "part.rows"),
    ],
    "seams style_aligned_equals_the_published_handler": [
        ("half = (mean_a - mean_b) / 2.0", "half = (mean_a - mean_b) / 4.0"),
        ("offsets.append(mean_to - mean * gains[-1])", "offsets.append(mean_to - mean)"),
        ("q = (q * gain + offset).to(q.dtype)", "q = (q * gain).to(q.dtype)"),
    ],
    "seams residuals_follow_rows_that_share_work_and_that_leave": [
        ("return x + self.still_here(residual.to(x.dtype))", "return x + residual.to(x.dtype)[: len(x)]"),
    ],
    "seams residuals_enter_where_diffusers_lets_them_in": [
        ("x = skips[-1] = rows.add(x, add.at_level(level))", "x = rows.add(x, add.at_level(level))"),
    ],
    "seams free_u_equals_diffusers": [
        ("half = x.shape[1] // 2", "half = x.shape[1]"),
        ("deepest >> place", "deepest"),
    ],
    "seams what_would_change_a_recorded_source_is_refused": [
        ("if self.joint is not None:\n            return True", "if False:\n            return True"),
        ("_at(self.contrast, row) != 1.0 for row in rows", "False for row in rows"),
    ],
    "seams a_row_without_a_key_is_plain_though_another_part_has_no_region": [
        ("if not any(edit.may_see_nothing(rows)):", "if any(part.visible is None for part in found):"),
    ],
    "seams a_recorded_source_serves": [
        ('"norm": behind(self.norm_with)', '"norm": False'),
    ],
    "seams every_field_of_an_edit_matters": [
        ("share * plain + (1.0 - share) * take(out, some)", "take(out, some)"),
        ("share * self.q.aligned(others) + (1.0 - share) * q", "q"),
    ],
    "source_cache what_a_control_reads_is_recorded_before_its_targets_are_known": [
        ("if not run.targets_known:\n        return {1: (1,)}", "if False:\n        return {1: (1,)}"),
    ],
    "sdedit no_noise_of_a_seed_serves_twice": [
        ('{"noise": 1, "edit-friendly": self.steps}', '{"noise": 0, "edit-friendly": 0}'),
    ],
}

CONDITIONS: Mutations = {
    "condition_pictures joints_that_are_none_are_refused": [
        ("all(abs(value) <= sys.float_info.max for value in joint)", "True"),
        ("if all(_is_person(one) for one in joints) else [joints]", "if joints[0] is not None else [joints]"),
    ],
    "condition_pictures joints_may_be_arrays": [
        ("return [_plain(one) for one in joints] if", "return joints if"),
    ],
    "condition_pictures bad_values_are_refused": [("not 8 <= side <= LARGEST_SIDE:", "not 8 <= side:")],
    "condition_pictures canny_is_its_definition": [
        ("across, down = ay < ax * TANGENT,", "across, down = ay <= ax,"),
        ("falling = (dx ^ dy) >= 0", "falling = (dx ^ dy) < 0"),
        ("labels, _ = ndimage.label(candidates, structure=np.ones((3, 3)))", "labels, _ = ndimage.label(candidates)"),
    ],
    "condition_pictures openpose_has_the_published_colours_and_leaves_out_what_is_not_seen": [
        ("canvas[inside] = (1.0 - OPENPOSE_OPACITY) * canvas[inside] +", "canvas[inside] ="),
    ],
    "condition_pictures larger_photographs_are_scaled_down_first": [
        ("if short_side is not None and short > short_side:", "if short_side is not None and short < short_side:"),
    ],
    "conditioned_inversion each_control_takes_part_in_its_own_steps": [
        ("step, rows = self.timesteps.index(timestep), x.expand", "step, rows = 0, x.expand"),
    ],
    "conditioned_inversion an_edit_inverts_with_the_sources_condition_alone": [
        ('return () if method == "noise" else steering_controls', "return () if method else steering_controls"),
    ],
    "controlnet differences_are_to_the_model_before_any_lora": [
        ("base_weights=sd.without_lora().unet.state_dict()", "base_weights=sd.unet.state_dict()"),
        ("if name in base:  # what the UNet", "if name not in base:  # what the UNet"),
    ],
}

LORA: Mutations = {
    "lora an_alpha_may_be_a_whole_number": [
        ("served = {kind: ALPHA_DTYPES if kind ==", "served = {kind: ALPHA_DTYPES if kind !="),
    ],
    "lora values_that_are_not_finite_are_refused": [("if alpha is not None and not isfinite(alpha):", "if False:")],
    "embeddings accents_of_their_own_are_those_of_their_letters": [
        ("if text != prompt and found:", "if False:"),
        ('text = unicodedata.normalize("NFC", prompt)', "text = prompt"),
        (" if start is not None and end is not None]", "]"),
    ],
    "lora every_layout_equals_diffusers": [
        ("loras[i].weights[layer[0]] * change.scale * delta", "change.scale * delta"),
        ("loras[i].weights[layer[0]] * change.scale * delta", "loras[i].weights[layer[0]] * delta"),
        ('flat = f"lora_te_text_model_{layer}" if text', 'flat = f"lora_te_{layer}" if text'),
    ],
    "lora the_first_layout_of_diffusers_as_it_was_written": [
        ('old = re.sub(r"(self_attn)', 're.sub(r"(self_attn)'),
        ('"unet": ("", "unet.", PEFT)', '"unet": ("unet.", PEFT)'),
    ],
    "lora diffusers_metadata_tell_alpha": [
        ('(sqrt(rank) if settings.get("use_rslora") else rank)', "rank"),
    ],
    "lora peft_folders_equal_peft": [
        ('alpha = next(told, settings.get("lora_alpha"))', 'alpha = settings.get("lora_alpha")'),
        ('alpha = next(told, settings.get("lora_alpha"))', "alpha = next(told, None)"),
    ],
    "lora numbered_layers_are_found_as_they_were_numbered": [
        ('blocks.sort(key=lambda name: name.startswith("mid_block"))', "pass"),
        ("if geglu and last[0] > fifth[0]", "if geglu"),
        (
            'TEXT_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")',
            'TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")',
        ),
    ],
    "lora a_tucker_core_lies_between": [('"oa,abhw,bi->oihw"', '"oa,abwh,bi->oihw"')],
    "lora an_alpha_of_nought_or_none_is_the_rank": [("if not alpha:", "if alpha is None:")],
    "lora several_are_summed_and_rounded_once": [
        ("total = total + loras[i]", "total = total.to(weight.dtype) + loras[i]"),
        ("loras = (*self.origin.lora, *loras)", "loras = (*loras,)"),
    ],
    "lora what_is_unchanged_is_shared_and_the_first_model_stays": [
        ("twin = sharing_copy(network)", "twin = network"),
        ("return copy.deepcopy(network, shared)", "return copy.deepcopy(network)"),
        ("torch.empty_like(weight).copy_(total)", "total.to(weight.dtype).contiguous()"),
    ],
    "lora a_weight_of_nought_leaves_the_very_bits": [("if any(lora.weights.values()):", "if True:")],
    "lora the_fingerprint_tells_files_and_weights_apart": [
        ('digest.update(f"{lora.sha256} {lora.weights}".encode())', "pass"),
    ],
    "lora all_that_does_not_fit_is_listed_at_once": [
        ("wrong = [kind for kind, shape in expected.items() if shapes[kind] != shape]", "wrong = []"),
        ('missing = [kind for kind in ("down", "up") if kind not in keys]', "missing = []"),
    ],
    "lora a_run_is_repeated_with_its_loras": [
        ("lora=[(lora.path, lora.weight) for lora in loras]", "lora=[lora.path for lora in loras]"),
        ('if lora_digest(path) != told["sha256"]:', "if False:"),
        ("if lora.sha256 not in (None, found.sha256):", "if False:"),
        ("((compiler or loras) and choose", "(compiler and choose"),
    ],
    "lora a_picture_inverted_without_is_inverted_without_again": [
        ("sd = sd.without_lora().with_loras(find_loras(made_from, picture))", "pass"),
    ],
    "lora peft_settings_that_mean_more_are_refused": [('"bias": ("none",),', "")],
}

CHECKPOINTS: Mutations = {
    "variants every_kind_of_file_gives_the_same_model": [
        ("if not found or any(key.startswith(usual) for key in entries):", "if True:"),
        (
            "replace(entry, stored=entry.stored or key) for key, entry in entries.items()}",
            "entry for key, entry in []}",
        ),
        ("key=lambda prefix: (layouts[prefix], len(prefix))", "key=lambda prefix: len(prefix)"),
        ("key=lambda prefix: (layouts[prefix], len(prefix))", "key=lambda prefix: layouts[prefix]"),
    ],
    "variants a_merge_without_autoencoder_takes_one_of_its_own": [
        ("entries = unwrapped_vae(read_entries(path))", "entries = read_entries(path)"),
    ],
    "variants plain_or_averaged_weights_are_taken_as_asked": [
        ("replace(entries[name], stored=entries[name].stored or name)", "replace(entries[name], stored=name)"),
        ("entries = averaged(entries, path) if wanted.ema else entries", "pass"),
        ("beside = bool(averaged_names(entries)) and not wanted.ema", "beside = False"),
        ("beside = bool(averaged_names(entries)) and not wanted.ema", "beside = bool(averaged_names(entries))"),
    ],
    "variants a_file_without_averages_cannot_give_them": [
        ("missing = [key for key in wanted if key not in names]", "missing = []"),
    ],
    "variants clip_skip_equals_the_transformer_written_out": [
        ("states[self.config.layers - self.config.clip_skip]", "states[self.config.layers - 1]"),
        ("return self._final_norm(states[", "return (states["),
    ],
    "variants clip_skip_is_part_of_a_model_and_of_its_runs": [
        ("if self.config.text.clip_skip or self.config.unet.velocity:", "if self.config.unet.velocity:"),
        ('clip_skip=settings.get("clip_skip", 0),', ""),
        ('if "clip_skip" in made_from and now != then:', "if False:"),
    ],
    "variants what_a_file_predicts_is_read_of_its_marks": [
        ('if "v_pred" in entries:', "if False:"),
        ('"v": "v_prediction", ', ""),
        ('return asked == "v_prediction", "as asked"', "pass"),
    ],
    "variants what_a_folder_predicts_is_read_of_its_scheduler": [
        ("velocity=schedule if velocity else None", "velocity=ScheduleConfig() if velocity else None"),
    ],
    "variants zero_terminal_snr_is_refused_by_name_whatever_is_asked": [
        ('"ztsnr" in entries', "False"),
        ('"zero_terminal_snr" in key and', "False and"),
    ],
    "variants each_row_of_the_network_s_output_is_turned": [
        ("x, alphas = take(x, rows), emb_of(alphas, rows)", "x = take(x, rows)"),
        ("for rows in (copies, None if retire is None else retire.staying):", "for rows in (copies,):"),
        ("a_t.sqrt() * v.float() + (1.0 - a_t).sqrt()", "a_t.sqrt() * v.float() - (1.0 - a_t).sqrt()"),
    ],
    "variants a_model_of_the_velocity_is_another_model_for_reruns_and_caches": [
        ("if self.config.text.clip_skip or self.config.unet.velocity:", "if self.config.text.clip_skip:"),
        ('prediction_type=settings.get("prediction_type"),', ""),
    ],
    "variants a_decoding_that_overflows_is_repeated_in_float32_and_said": [
        ("again = compute(self.exact, given.float())", "again = found"),
        ("self.exact = copy.deepcopy(self.network).float()", "self.exact = self.network.float()"),
    ],
    "embeddings prompts_are_embedded_as_diffusers_does": [
        ("others = F.embedding((ids - count).clamp(min=0)", "others = F.embedding((ids - count - 1).clamp(min=0)"),
        ("return torch.where((ids >= count)[..., None], others, known)", "return known"),
    ],
    "embeddings the_longest_word_is_found_first_and_whole": [
        ("longest_first = sorted(words, key=len, reverse=True)", "longest_first = sorted(words, key=len)"),
        ("re.compile(phrase_pattern(word), re.IGNORECASE)", "re.compile(phrase_pattern(word))"),
        ("if all(end <= other_start or start >= other_end", "if True or all(end <= other_start"),
    ],
    "embeddings spans_and_positions_are_of_the_whole_word": [
        ("spans += [(first + begin, last + begin) for first, last in places]", "spans += places"),
    ],
    "embeddings a_word_cut_in_half_is_named": [
        ("and spans[room] == spans[room - 1]:", "and False:"),
        ("ids[room] >= self.vocab_size and spans[room] == spans[room - 1]:", "ids[room] >= self.vocab_size:"),
    ],
    "embeddings a_word_cut_in_half_is_refused_before_an_inversion": [
        ("        sd.tokenizer.check_words(prompt)\n", "        pass\n"),
    ],
    "embeddings words_beside_a_lora": [
        ("own = {key: entry for key, entry in entries.items() if not beside or key in beside}", "own = entries"),
        ("base=None if self.base is None else self.base._knowing(embeddings),", ""),
        ("words = [word for word in found.words if word not in set(known)]", "words = found.words"),
    ],
    "embeddings nameless_vectors_are_called_as_their_file": [
        ("path.stem if key in NAMELESS else key", "key"),
    ],
    "embeddings two_words_of_one_name_are_refused": [('key = " ".join(fold(word).split())', "key = word")],
    "embeddings the_fingerprint_tells_files_and_names_apart": [
        ('digest.update(f"{embedding.sha256} {embedding.name}".encode())', "pass"),
        ('digest.update(f"{embedding.sha256} {embedding.name}".encode())', "digest.update(embedding.sha256.encode())"),
    ],
    "embeddings offloaded_it_is_the_same": [
        ("networks=(*offloaded.networks[:2], text_encoder)", "networks=offloaded.networks"),
    ],
    "embeddings a_run_is_repeated_with_its_embeddings": [
        ("(word.name, word.path) if word.name else word.path for word in", "word.path for word in"),
        ('if file_digest(path) != told["sha256"]:', "if False:"),
        ("if embedding.sha256 not in (None, found.sha256):", "if False:"),
    ],
    "embeddings a_picture_inverted_without_is_inverted_without_again": [
        ("sd = sd.without_embeddings().with_embeddings(find_embeddings(made_from, picture))", "pass"),
    ],
}


PIEBENCH: Mutations = {
    "metrics noise_error_and_similarity_equal_torchmetrics": [
        ("-10.0 * math.log10(error)", "-20.0 * math.log10(error)"),
        ("astype(np.float32) / 255.0 * mask", "astype(np.float32) / 256.0 * mask"),
        ("SIGMA, WINDOW = 1.5, 11", "SIGMA, WINDOW = 1.5, 13"),
        ("similarity / ((mean_x**2 + mean_y**2 + C1)", "similarity / ((mean_x**2 + mean_y**2 + C2)"),
    ],
    "metrics similarity_of_2023_leaves_the_border_out": [
        ('border = WINDOW // 2 if libraries == "2023" else 0', "border = 0"),
    ],
    "metrics structure_distance_equals_the_published_hook": [
        ('if name.split(".")[-1] in ("k_proj", "key")]', 'if name.split(".")[-1] in ("q_proj", "query")]'),
        ("projections[-1].register", "projections[0].register"),
        ("antialias=smooth,", "antialias=True,"),
        ("x / 255.0 if divided else x,", "x / 255.0,"),
    ],
    "metrics prompt_similarity_equals_torchmetrics": [
        ("Image.Resampling.BICUBIC\n    )\n    left, top", "Image.Resampling.BILINEAR\n    )\n    left, top"),
        ("(resized.width - size) // 2, (resized.height - size) // 2", "0, 0"),
    ],
    "metrics prompt_similarity_is_not_below_zero": [("max(0.0, 100.0 * float((image", "(100.0 * float((image")],
    "metrics means_leave_nan_out": [("x = x[~np.isnan(x)]", "x = x")],
    "metrics a_torchvision_that_fails_to_import_is_named": [("if broken is not None:", "if False:")],
    "piebench masks_equal_the_published_decoder": [
        ("mask[[0, -1], :] = 1", "pass"),
        ("mask[:, [0, -1]] = 1", "pass"),
        ("if start > height * width]", "if start >= height * width]"),
    ],
    "piebench a_broken_entry_is_named": [("if not image.resolve().is_relative_to(pictures):", "if False:")],
    "piebench where_all_may_change_what_is_kept_has_no_score": [("if kept.any() else math.nan", "")],
    "piebench scores_are_those_of_the_metrics": [
        ('edited = mask if name == "clip_similarity_target_image_edit_part" else None', "edited = None"),
        ('divided = name == "structure_distance_divided"', "divided = False"),
    ],
    "piebench every_method_and_inverter_makes_edits_of_its_own": [
        ('"ddim": ("ddim", False),', '"ddim": ("ddim", True),')
    ],
    "piebench edits_made_otherwise_are_not_mixed_in": [
        ("apart = [name for name, value in settings.items() if before", "apart = [name for name in () if before"),
    ],
    "piebench a_run_that_was_cut_off_goes_on": [("if name not in scores]\n", "]\n")],
    "piebench tables_have_the_published_units_and_rows": [
        ("scale * row.scores.get(metric, math.nan)", "row.scores.get(metric, math.nan)"),
    ],
    "piebench the_command_edits_measures_and_prints": [
        ("controls = build_controls(args) if names_controls(args) else None", "controls = None"),
    ],
}


BATCH: Mutations = {
    "batch pictures_of_controls_lie_beside_the_job_file": [
        ("found = beside if beside.exists() else find_near(path, self.near)", "found = find_near(path, self.near)"),
        ("return replace(control, mask=_with_pictures(control.mask, find))", "return control"),
        ("target=each(control.target))", "target=control.target)"),
    ],
    "folders": [
        ("if rename is not None and rename(HERE", "if rename is None and rename(HERE"),
        ("gone = {*names, *dropped}", "gone = {*names}"),
        ("if entry.name not in gone:\n                    _link", "if entry.name in gone:\n                    _link"),
        ("os.replace(stage / names[-1], folder / names[-1])", "pass"),
        ("return own and not worked_in and not folder.is_mount()", "return own and not folder.is_mount()"),
        ("fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ("    return _is_named(handle, path)\n", "    return True\n"),
        ("for path in missing if made else ():", "for path in ():"),
        ("shutil.rmtree(stage, ignore_errors=True)", "pass"),
    ],
    "result a_full_disk_leaves_no_truncated_picture": [
        ("temporary.write_bytes(encoded.getbuffer())", "temporary.write_bytes(encoded.getbuffer()[:1000])"),
        ("if isinstance(error, WriteError) or error.errno not in NO_ROOM:", "if True:"),
    ],
    "result an_older_result_is_replaced_only_when_asked": [
        ("if present and not overwrite:", "if False:"),
        ("return settings if whole else None", "return settings"),
    ],
    "batch results_are_those_of_single_runs": [
        ("if key is None or self.sources[key] < 2:", "if True:"),
        ("len(self.unit) > 1:", "len(self.unit) > 9:"),
    ],
    "batch a_second_call_does_what_is_left": [
        ("if not is_done(job, out):\n", "if True:\n"),
    ],
    "batch jobs_that_share_a_source_stay_beside_each_other": [
        ('else (*OF_TARGETS, "seed")', "else OF_TARGETS"),
        ('names += ("guidance_scale",) if', "names += () if"),
        ('names = OF_INVERSION + (("seed",) if drawn else ())', "names = OF_INVERSION"),
        ('if (seeded and "seed" not in self.given) or', "if"),
    ],
    "batch the_report_survives_what_a_kill_leaves": [
        ('if file.read(1) != b"\\n":', "if False:"),
        ("known = {name: rows[name] for name in self.order if name in rows}", "known = {}"),
    ],
    "batch bad_jobs_do_not_stop_the_rest": [
        ('told = f"{type(error).__name__}: {told}"', "pass"),
        ("            check_with_model(sd, job)\n", ""),
    ],
    "batch ids_name_folders_inside_the_output_folder": [
        ('unicodedata.normalize("NFC", job.id).casefold()', "job.id"),
        ("> LONGEST_ID:", "> 2 * LONGEST_ID:"),
    ],
    "batch settings_that_changed_are_noticed": [
        ('rows.get(job.id, {}).get("job", job.digest) != job.digest', "False"),
    ],
    "batch a_full_disk_ends_the_batch": [
        ("isinstance(error, OSError) and error.errno in FULL", "False"),
    ],
    "batch two_processes_do_no_job_twice": [
        ("        if claim is None:\n            return None\n", ""),
    ],
    "batch one_inversion_and_one_source_are_held_at_a_time": [
        ("return [jobs[i] for *_, i in sorted(places)]", "return list(jobs)"),
    ],
    "batch shards_are_parts_that_make_the_whole": [
        ("(part - 1) * len(jobs) // parts :", "(part - 1) * (len(jobs) // parts) :"),
    ],
    "cli sigterm_cleans_up_like_ctrl_c": [
        ("return 143 if terminated else 130", "return 130"),
        ("        signal.signal(signal.SIGTERM, before)\n", "        pass\n"),
    ],
    "cli two_runs_do_not_share_a_folder": [
        ("reserved(folder, new=args.out is None)", "reserved(folder)"),
    ],
}


PAGE: Mutations = {
    "app_runs a_run_is_what_the_library_makes_of_it": [
        ("controls=every,\n        guidance_scale=asked.guidance,", "controls=every,"),
    ],
    "app_runs a_picture_is_inverted_once_and_its_source_recorded_for_the_second_prompt": [
        ("None if asked.picture is None else session.inverted.get(asked.inversion_key())", "None"),
        ("(len(methods) > 1 or session.asked_before == key)", "len(methods) > 1"),
    ],
    "app_runs methods_share_one_source_and_start_from_its_noise": [
        ("pays = asked.reuse and bool(asked.prompts)", "pays = bool(asked.prompts)"),
        ("(len(methods) > 1 or session.asked_before == key)", "session.asked_before == key"),
    ],
    "app_runs what_tabs_keep_is_bounded_and_their_own": [
        ("while len(self.inverted) > INVERTED:", "while False:"),
        ("idle[: max(0, len(self.by_tab) - self.most)]", "idle[:0]"),
        ("while len(self.folders) > OUTCOMES:", "while False:"),
    ],
    "app_runs recorded_sources_of_all_tabs_fit_a_budget": [("other.recorded = None", "break")],
    "app_runs a_trajectory_carries_its_picture": [
        ('if settings.get("picture") is not None:  # it travels with the PNG', "if False:"),
    ],
    "app_runs the_share_weighs_phases_by_their_rows": [
        ("total = sum(phase.calls * phase.rows for phase in self.phases)", "total = sum(p.calls for p in self.phases)"),
        ("finished = min(max(0, self.calls - 1), now.calls)", "finished = max(0, self.calls - 1)"),
    ],
    "app_runs cancel_acts_within_a_step_and_leaves_nothing": [
        ("for part in network.modules()]", "for part in ()]"),
        ("for handle in handles:\n            handle.remove()", "pass"),
    ],
    "app_runs a_run_that_waits_is_cancelled_before_it_begins": [
        ("if self.ticket is None:\n            self.ticket = Ticket()", "self.ticket = Ticket()"),
    ],
    "app_runs a_run_whose_page_is_gone_stops": [
        ("finally:\n            ticket.stop.set()", "finally:\n            pass")
    ],
    "app_runs one_page_has_one_run_and_all_pages_one_worker": [("if self.at_work:", "if False:")],
    "app_runs warnings_are_told_and_told_again_for_a_kept_picture": [
        ("*(inverted.warnings if inverted is not None else ()), ", ""),
    ],
    "app_runs a_words_mask_is_found_once_and_cut_anew": [
        ("if session.found is None or session.found.key != key:", "if session.found is None:"),
        ("session.found is None or session.found.key != key", "True"),
    ],
    "app_runs what_an_editor_gives": [
        ("picture is not None and picture.getbbox() is not None", "picture is not None"),
    ],
    "app_runs pages_name_no_other_server_and_forbid_them": [
        ('body = ELSEWHERE.sub(b"", body)', "body = bytes(body)"),
        ('(b"content-security-policy", POLICY.encode())', '(b"x-policy", POLICY.encode())'),
    ],
}


DRAWN_POSES: dict[str, tuple[tuple[str, str], ...]] = {
    "demo_stick_figure": (
        ("pixels = max(1, round(width * self.thickness * self._side))", "pixels = max(1, round(width * self._side))"),
        ("self._line([*outline, *outline[:2]], LIMB)", "pass"),
        (
            "self._line([(n.u, n.v) for n in curve(nodes)], TRUNK)",
            "super().coat(nodes, colour, pattern, colour, marks)",
        ),
    ),
    "demo_world between_two_poses_lie_further_ones": (("return a + (b - a) * amount", "return a + (b - a) * 0.5"),),
    "demo_adapter examples_are_of_all_poses_and_captions_leave_them_out": (
        ("if way != pose or not told:", "if not told:"),
    ),
    "demo_adapter the_right_stick_beats_a_wrong_one_and_none": (
        ("others = Pool(pool.latents, pool.sticks.roll(1, 0), pool.ids)", "others = pool"),
    ),
    "demo_adapter the_file_is_an_ordinary_adapters": (
        ('parts = ["body", str(blocks * int(parts[1]) + int(parts[3])), *parts[4:]]', "pass"),
    ),
    "demo_adapter each_setting_of_the_recipe_matters": (
        ("torch.where(silent[:, None], empty, pool.ids[rows])", "pool.ids[rows]"),
    ),
    "demo_adapter demo_is_a_path_and_a_run_with_it_is_repeated": (
        (
            "return self if locate_adapter(self.path) == DEMO_ADAPTER else super().found(find)",
            "return super().found(find)",
        ),
        ('DEMO_ADAPTER if path == "demo" else Path(path)', "Path(path)"),
    ),
    "demo_adapter demo_pose_takes_a_drawing": (("facing=pose is not None)", "facing=True)"),),
}


VIDEO: Mutations = {
    "frames frames_that_are_held_count_as_often": [
        ("unit = math.gcd(*told)", "unit = min(told, default=0)"),
        ('"loop": 0, "duration": round(1000.0 / fps)}', '"loop": 0, "duration": 1000.0 / fps}'),
    ],
    "frames durations_that_were_rounded_hold_no_frame": [("if told and unit < FASTEST:", "if not told:")],
    "frames an_animation_is_not_held_for_ever": [("if sum(held) > MOST_FRAMES:", "if sum(held) >= MOST_FRAMES:")],
    "frames no_call_of_the_network_takes_more_frames_than_asked": [
        ("[every[i : i + at_once] for i in range(0, len(every), at_once)]", "[every]"),
        ("cache = _record(sd, asked, video, trajectory, store, progress) if reads else None", "cache = None"),
        ("[every[i : i + at_once - 1] for i in range(1, len(every), at_once - 1)]", "[every[1:]]"),
    ],
    "frames several_adapters_have_conditions_each": [
        ("    else:\n        sets = conditions\n", "    else:\n        sets = [conditions[0]] * len(adapters)\n"),
    ],
    "frames a_real_picture_is_the_source_of_all_frames": [("asked = replace(asked, skip_steps=first_step)", "pass")],
    "frames behind_the_first_frame_the_others_read_it": [
        ("read = tuple(s if lead else f for lead, s, f", "read = tuple(f if lead else s for lead, s, f"),
    ],
    "frames both_lies_between_and_follows_the_union_s_weight": [
        ("Part(source, weight=self.weight), *beside, *own", "Part(source), *beside, *own"),
        ("(Part(others, weight=self.weight),) if not all(leads)", "(Part(others),) if not all(leads)"),
    ],
    "frames masks_of_the_first_frame_restrict_what_others_read_of_it": [
        ("masks = [control.mask.targets[i] for i in frames]", "masks = control.mask.targets[: len(frames)]"),
    ],
    "frames one_frame_s_picture_runs_again_alone": [
        ("shown = (i,) if video.anchor == ", "shown = (i,) if True or video.anchor == "),
        ("[[pictures[k] for k in shown] for pictures in settings", "[list(pictures) for pictures in settings"),
    ],
    "frames every_form_shows_the_frames_and_runs_again": [
        ('"lossless": True, "exif": exif', '"exif": exif'),
        ('text = text or str(picture.getexif().get(DESCRIPTION, ""))', "pass"),
    ],
    "frames a_gif_has_one_palette": [('"palette": palette,', "")],
    "frames animations_run_for_ever_at_the_rate_asked": [
        ('{"save_all": True, "loop": 0,', '{"save_all": True, "loop": 1,'),
        ("max(2, round(100.0 / fps)) * 10", "100"),
    ],
    "frames a_shorter_video_leaves_no_frame_of_a_longer_one": [
        ("path.unlink(missing_ok=True)\n        return [fol", "return [fol")
    ],
    "frames conditions_in_every_form": [
        ("if file.suffix.lower() in PICTURES), key=_by_number)", "if file.suffix.lower() in PICTURES))")
    ],
    "frames what_only_the_whole_video_tells_is_refused_before_long_work": [
        ("    check(asked.controls, len(video))  # a mask for each frame, where there are several\n", ""),
        ("settle(sd, replace(asked, skip_steps=first_step), trajectory)\n    branches", "branches"),
    ],
    "video_demo a_paw_stays_down_while_the_body_passes_and_is_carried_ahead": [
        ("return -STEP * math.cos(math.pi * swung)", "return STEP * math.cos(math.pi * swung)"),
    ],
    "video_demo a_jump_crouches_leaves_the_ground_and_comes_back": [
        ('Between("standing", "lying", CROUCH', 'Between("standing", "jumping", CROUCH'),
    ],
}


def mutants() -> list[Mutant]:
    """All of them."""
    found = []
    parts = (
        SOURCE_CACHE,
        RUN,
        GUIDANCE_AND_SAMPLERS,
        ROUND_TRIPS,
        CONTROLS,
        MODELS,
        KERNELS_AND_WEIGHTS,
        FILES_AND_COMMANDS,
        SEAMS,
        LORA,
        PAGE,
        CHECKPOINTS,
        CONDITIONS,
        DRAWN_POSES,
        VIDEO,
        BATCH,
        PIEBENCH,
    )
    for key, mutations in ((key, mutations) for part in parts for key, mutations in part.items()):
        module, *names = key.split(" ")
        file = f"tests/test_{module}.py"
        tests = tuple(f"{file}::test_{name}" for name in names) or (file,)
        found += [Mutant(old, new, tests) for old, new in mutations]
    return found


def places(tree: Path, text: str) -> list[Path]:
    """The product's files in which a text stands, each as often as it does."""
    files = (path for folder in PRODUCT for path in sorted((tree / folder).rglob("*.py")))
    return [path for path in files for _ in range(path.read_text(encoding="utf-8").count(text))]


def copy_tree(into: Path) -> Path:
    """What tests need of the tree, in a new folder."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results", "*.png")
            shutil.copytree(ROOT / name, into / name, ignore=None if name == "weights" else ignored)
        else:
            shutil.copy(ROOT / name, into / name)
    return into


@contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[Path | None]:
    """The tree with a mutant in it; None, and the tree as it is, where its text does not stand there once."""
    found = places(tree, mutant.old)
    if len(found) != 1:
        yield None
        return
    before = found[0].read_text(encoding="utf-8")
    found[0].write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield found[0].relative_to(tree)
    finally:
        found[0].write_text(before, encoding="utf-8")


def import_what_is_heavy() -> None:
    """All but masa, once: what a forked process then has."""
    import diffusers
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)  # threads do not survive a fork
    for module, names in (
        (diffusers, ("AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel")),
        (transformers, ("CLIPTextConfig", "CLIPTextModel")),
    ):
        for name in names:
            getattr(module, name)


def run_tests(tree: Path, tests: Sequence[str], log: Path) -> int:
    """pytest's exit code for tests of a tree, in a process of their own."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setsid()
        os.chdir(tree)
        sys.path[:] = [str(tree), str(tree / "tests"), *(p for p in sys.path if Path(p).resolve() != ROOT / "tests")]
        sys.dont_write_bytecode = True
        code = 70
        try:
            import pytest

            plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tree)]
            code = int(pytest.main([*plain, "--basetemp", str(tree / "temporary"), *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def verdict(code: int) -> str:
    """pytest's exit code as what became of a mutant: it did not import (2), its tests are not there (4, 5)."""
    return {0: SURVIVED, 4: NO_TESTS, 5: NO_TESTS}.get(code, KILLED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their text or their tests")
    parser.add_argument("--check", action="store_true", help="only whether every mutant's text is found")
    args = parser.parse_args()
    chosen = [
        m for m in mutants() if not args.words or any(w in " ".join((m.old, m.new, *m.tests)) for w in args.words)
    ]
    if args.check:
        lost = [m for m in chosen if len(places(ROOT, m.old)) != 1]
        for m in lost:
            print(f"{NOT_FOUND} ({len(places(ROOT, m.old))} times): {m.title}")
        print(f"{len(chosen) - len(lost)} of {len(chosen)} texts are found")
        return int(bool(lost))
    import_what_is_heavy()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder))
        log = tree / "log.txt"
        tests = sorted({test for m in chosen for test in m.tests})
        if run_tests(tree, tests, log) != 0:
            print(log.read_text()[-3000:])
            print("the tests fail without any mutant")
            return 2
        for i, m in enumerate(chosen, 1):
            began = time.monotonic()
            with mutated(tree, m) as file:
                outcome = NOT_FOUND if file is None else verdict(run_tests(tree, m.tests, log))
            outcomes[outcome] += 1
            seconds = time.monotonic() - began
            print(f"{i}/{len(chosen)} {outcome} ({seconds:.0f} s) {file or ''}: {m.title}", flush=True)
            if outcome == NO_TESTS:
                print(log.read_text()[-500:])
    run = outcomes[KILLED] + outcomes[SURVIVED]
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    print(f"killed: {outcomes[KILLED]} of {run}, {outcomes[KILLED] / max(1, run):.1%}")
    return int(outcomes[KILLED] < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
