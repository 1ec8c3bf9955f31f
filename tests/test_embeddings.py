"""Textual inversion: words of several vectors, as diffusers and transformers embed them, found, kept and repeated."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from test_tokenizer import merges, vocabulary

import masa
from masa.cli import main
from masa.cli.arguments import parse_embedding
from masa.controls.token_alignment import TokenizedPrompt, replacement_map
from masa.models.clip import TokenTable
from masa.models.tokenizer import Tokenizer
from masa.runtime.embeddings import Embedding, as_embeddings
from masa.weights.embeddings import open_embedding

WIDTH = 32
SETTINGS = {"steps": 2, "height": 64, "width": 64, "progress": False, "controls": masa.MasaCtrl(1)}


def vectors(*shape, seed=0):
    return 30 * 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(path, state, metadata=None):
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    return {
        "one": save(folder / "one.safetensors", {"<one>": vectors(WIDTH)}),
        "three": save(folder / "three.safetensors", {"<three>": vectors(3, WIDTH, seed=1)}),
        "stem": save(folder / "my-cat.safetensors", {"emb_params": vectors(2, WIDTH, seed=2)}),
        "half": save(folder / "half.safetensors", {"<half>": vectors(2, WIDTH, seed=3).half()}),
    }


@pytest.fixture(scope="module")
def knowing(tiny, files):
    return tiny.with_embeddings(list(files.values()))


# ------------------------------------------------------------------------------------------------ as diffusers has it


def their_embedding(folder, prompts, paths, names=None):
    """transformers' text encoder on prompts with diffusers' textual inversion."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary(), merges=merges(), model_max_length=77),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for path, name in zip(paths, names or [None] * len(paths), strict=True):
        pipeline.load_textual_inversion(str(path), token=name)
    found = [pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer) for prompt in prompts]
    padded = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    ids = pipeline.tokenizer(found, **padded).input_ids
    with torch.no_grad():
        return ids, pipeline.text_encoder(ids).last_hidden_state


PROMPTS = [
    "a photo of <one>",
    "a <three> in the snow, <one> beside <three>!",
    "<three>",
    "a photo of a my-cat, sitting",
    "no word of these, < one > neither",
]


def test_prompts_are_embedded_as_diffusers_does(tiny_folder, tiny, files):
    paths = [files[name] for name in ("one", "three", "stem")]
    names = [None, None, "my-cat"]  # diffusers would call it emb_params
    ids, expected = their_embedding(tiny_folder, PROMPTS, paths, names)
    sd = tiny.with_embeddings(paths)
    assert torch.equal(sd.tokenizer(PROMPTS), ids)
    found = sd.encode_prompt(PROMPTS)
    assert torch.equal(found, expected)
    assert not torch.allclose(found[:4], tiny.encode_prompt(PROMPTS)[:4], atol=1e-3)
    assert torch.equal(found[4], tiny.encode_prompt(PROMPTS)[4])


def test_a_name_of_one_s_own(tiny_folder, tiny, files):
    ids, expected = their_embedding(tiny_folder, ["a <pet>"], [files["three"]], ["<pet>"])
    sd = tiny.with_embeddings(("<pet>", files["three"]))
    assert torch.equal(sd.tokenizer(["a <pet>"]), ids)
    assert torch.equal(sd.encode_prompt(["a <pet>"]), expected)
    assert torch.equal(sd.encode_prompt(["a <three>"]), tiny.encode_prompt(["a <three>"]))


def test_vectors_stand_where_the_word_does(knowing, tiny, files):
    """The embeddings written out: the checkpoint's rows, and the file's in the word's place."""
    table = knowing.text_encoder.model.get_input_embeddings()
    assert isinstance(table, TokenTable)
    ids = knowing.tokenizer(["a <three> cat"])
    own = tiny.text_encoder.model.get_input_embeddings().weight
    plain = tiny.tokenizer(["a cat"])[0].tolist()
    expected = torch.cat([own[plain[:2]], vectors(3, WIDTH, seed=1), own[plain[2:4]]])
    assert torch.equal(table(ids)[0, :7], expected)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<cat>": (49408,), "<cat> toy": (49409, 49410), "cat": (49411,), "Ünï": (49412,)}
    return Tokenizer.clip().with_words(words)


def test_the_longest_word_is_found_first_and_whole(tokenizer):
    plain = Tokenizer.clip()

    def ids(prompt):
        return tokenizer.encode(prompt)[0]

    assert ids("a <cat> toy") == [*plain.encode("a")[0], 49409, 49410]
    assert ids("a <cat>  TOY") == ids("a <cat> toy")
    assert ids("a <cat> toys") == [*plain.encode("a")[0], 49408, *plain.encode("toys")[0]]
    assert ids("x<CAT>y") == [*plain.encode("x")[0], 49408, *plain.encode("y")[0]]
    assert ids("catalogue, Cat's") == [*plain.encode("catalogue,")[0], 49411, *plain.encode("'s")[0]]
    assert ids("ÜNÏ") == [49412]
    assert ids("") == []
    with pytest.raises(masa.MasaError, match="is not text"):
        tokenizer.encode(3)


def test_spans_and_positions_are_of_the_whole_word(tokenizer):
    prompt = "one <cat> toy, a <cat> and a dog"
    spans = tokenizer.encode(prompt)[1]
    assert [prompt[start:end] for start, end in spans] == [
        *("one", "<cat> toy", "<cat> toy", ",", "a", "<cat>", "and", "a", "dog"),
    ]
    assert tokenizer.token_positions(prompt, "<cat> toy") == (2, 3)
    assert tokenizer.token_positions(prompt, "dog") == (9,)
    assert tokenizer.token_positions("a <CAT> toy", "<cat>") == (2, 3)  # a part of a word is the word
    aligned = TokenizedPrompt.of("a <cat> toy", tokenizer.encode)
    assert aligned.words == (("a", (1,)), ("<cat>", (2, 3)), ("toy", (2, 3)))


def test_accents_of_their_own_are_those_of_their_letters(tokenizer):
    """Typed as letter and accent the word is the same, and so is all behind it."""
    composed, apart = "Man\u0303ana, an ünï dog", "Man\u0303ana, an u\u0308ni\u0308 dog"
    ids, spans = tokenizer.encode(apart)
    assert ids == tokenizer.encode(composed)[0]
    assert [apart[start:end] for start, end in spans[-3:]] == ["an", "u\u0308ni\u0308", "dog"]
    for word, own in (("ünï", [49412]), ("u\u0308ni\u0308", [49412]), ("dog", ids[-1:])):
        positions = tokenizer.token_positions(apart, word)
        assert [ids[position - 1] for position in positions] == own
    aligned = TokenizedPrompt.of(apart, tokenizer.encode)
    assert aligned.words[-2:] == (("u\u0308ni\u0308", (len(ids) - 1,)), ("dog", (len(ids),)))
    assert 49411 not in tokenizer.encode("a cat\u0327 here")[0]  # another letter, not the word "cat"
    assert 49412 in tokenizer.encode("\u0958 u\u0308ni\u0308")[0]  # one character, which is two when composed


def test_a_word_cut_in_half_is_named(tokenizer):
    fits = "a " * 73 + "<cat> toy"
    assert tokenizer([fits])[0, 74:76].tolist() == [49409, 49410]
    with pytest.raises(masa.MasaError, match=r"'<cat> toy' stands for 2 tokens, and only 1 .* first 75"):
        tokenizer(["a " + fits])
    with pytest.warns(UserWarning, match="left out '<cat> toy'"):  # as any other word
        assert 49409 not in tokenizer(["a a " + fits])


def test_a_word_cut_in_half_is_refused_before_an_inversion(knowing, monkeypatch):
    monkeypatch.setattr("masa.sampling.invert", lambda *given, **more: pytest.fail("inverted"))
    picture = torch.zeros(3, 64, 64)
    with pytest.raises(masa.MasaError, match="'<three>' stands for 3 tokens, and only 2"):
        masa.edit(knowing, picture, "a " * 73 + "<three>", progress=False)


def test_a_tokenizer_without_words_is_the_plain_one(tokenizer):
    back = tokenizer.with_words({})
    assert back.encode("a <cat> toy") == Tokenizer.clip().encode("a <cat> toy")
    assert tokenizer.words["cat"] == (49411,)


# ------------------------------------------------------------------------------------------------ files


def test_words_beside_a_lora(tiny, tiny_folder, tmp_path):
    """cloneofsimo's files: metadata name the words, and all else is the LoRA's."""
    state = {"text_encoder:0:up": torch.randn(WIDTH, 1), "text_encoder:0:down": torch.randn(1, WIDTH)}
    state |= {"<s1>": vectors(WIDTH, seed=4), "<s2>": vectors(WIDTH, seed=5)}
    metadata = {"<s1>": "<embed>", "<s2>": "<embed>", "text_encoder": '["CLIPAttention"]'}
    path = save(tmp_path / "both.safetensors", state, metadata)
    sd = tiny.with_embeddings(path)
    assert set(sd.tokenizer.words) == {"<s1>", "<s2>"}
    with pytest.warns(UserWarning, match=r"embeddings of words \(<s1>, <s2>\), which are not loaded; give"):
        alone = tiny.with_lora(path)
    with warnings.catch_warnings(action="error"):
        both = masa.load(tiny_folder, device="cpu", dtype="fp32", lora=path, embeddings=path)
        other_way = tiny.with_embeddings(path).with_lora(path)
    for found in (other_way, alone.with_embeddings(path)):
        assert torch.equal(found.encode_prompt(["a <s2>"]), both.encode_prompt(["a <s2>"]))
        assert found.fingerprint == both.fingerprint
        assert found.origin.lora == both.origin.lora
        assert torch.equal(found.without_lora().encode_prompt(["a <s2>"]), sd.encode_prompt(["a <s2>"]))
    assert not torch.equal(both.encode_prompt(["a <s2>"]), sd.encode_prompt(["a <s2>"]))
    assert torch.equal(both.without_embeddings().encode_prompt(["a <s2>"]), alone.encode_prompt(["a <s2>"]))
    with pytest.raises(masa.MasaError, match=r"holds several words \(<s1>, <s2>\), and one name"):
        tiny.with_embeddings(("<x>", path))


@pytest.mark.parametrize("key", ["emb_params", "*"])
def test_nameless_vectors_are_called_as_their_file(tmp_path, key):
    path = save(tmp_path / "Charturner v2.safetensors", {key: vectors(2, WIDTH)})
    assert list(open_embedding(path, None, WIDTH).vectors) == ["Charturner v2"]
    assert list(open_embedding(path, "<c>", WIDTH).vectors) == ["<c>"]
    for empty in ("", " "):
        with pytest.raises(masa.MasaError, match=f"a word is called '{empty}'"):
            open_embedding(path, empty, WIDTH)


REFUSED = {
    "SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "for SDXL"),
    "SD 2": ({"emb_params": (2, 1024)}, "for a Stable Diffusion 2"),
    "another width": ({"<x>": (768,)}, "for another model: its vectors have 768 numbers, this model's 32"),
    "LoRA": ({"lora_unet_x.lora_up.weight": (4, 4)}, "is a LoRA"),
    "numbered LoRA": ({"unet:0:up": (32, 1), "unet:0:down": (1, 32)}, "is a LoRA"),
    "whole model": ({"model.diffusion_model.x": (4,)}, "is a whole model"),
    "a picture": ({"x": (3, 4, 4)}, "holds no embeddings"),
    "scalars": ({"x": ()}, "holds no embeddings"),
    "nothing": ({}, "holds no embeddings"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_name(tiny, tmp_path, kind):
    shapes, message = REFUSED[kind]
    path = save(tmp_path / "other.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(masa.CheckpointError, match=message) as caught:
        tiny.with_embeddings(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["old.pt", "old.bin", "renamed.safetensors"])
def test_pickles_are_refused_with_a_command_that_converts_them(tiny, tmp_path, name):
    path = tmp_path / name
    value = vectors(2, WIDTH)
    torch.save({"string_to_param": {"*": value}, "name": "old"} if name != "old.bin" else {"<old>": value}, path)
    with pytest.raises(masa.CheckpointError, match="is a pickled embedding") as caught:
        tiny.with_embeddings(path)
    code = str(caught.value).split('python -c "')[1].rstrip('"').replace("renamed.safetensors')", "new.safetensors')")
    exec(code)
    new = path.with_name("new.safetensors") if name.startswith("renamed") else path.with_suffix(".safetensors")
    word = "<old>" if name == "old.bin" else new.stem
    assert torch.equal(open_embedding(new, None, WIDTH).vectors[word], value)


def test_values_that_are_not_finite_and_missing_files(tiny, tiny_folder, tmp_path):
    with pytest.raises(masa.CheckpointError, match="NaN or infinite values in <x>"):
        tiny.with_embeddings(save(tmp_path / "nan.safetensors", {"<x>": vectors(WIDTH) / 0}))
    with pytest.raises(FileNotFoundError, match="no embedding at nowhere"):
        masa.load(tiny_folder, device="cpu", embeddings="nowhere")
    with pytest.raises(masa.CheckpointError, match="holds no embeddings"):
        tiny.with_embeddings(save(tmp_path / "int.safetensors", {"<x>": torch.ones(WIDTH, dtype=torch.int64)}))


def test_two_words_of_one_name_are_refused(tiny, files, tmp_path):
    other = save(tmp_path / "other.safetensors", {"<ONE>": vectors(WIDTH)})
    for given in ([files["one"], other], [("<one>", files["three"]), files["one"]]):
        with pytest.raises(masa.MasaError, match=r"both hold a word .*; give one another name"):
            tiny.with_embeddings(given)
    with pytest.raises(masa.MasaError, match="both hold a word"):
        tiny.with_embeddings(files["one"]).with_embeddings(files["one"])


def test_what_load_takes():
    assert as_embeddings(None) == ()
    assert as_embeddings("a") == (Embedding("a"),)
    assert as_embeddings(("x", "a")) == (Embedding("a", "x"),)
    assert as_embeddings(["a", ("x", "b")]) == (Embedding("a"), Embedding("b", "x"))
    for wrong in (3, [3], {"x": "a"}, [("x", "y", "z")], ("x", 3)):
        with pytest.raises(masa.MasaError, match="expected a path"):
            as_embeddings(wrong)


# ------------------------------------------------------------------------------------------------ a model of its own


def test_the_first_model_stays_and_weights_are_shared(knowing, tiny, files):
    assert tiny.tokenizer.words == {}
    assert "word &lt;three&gt;" in knowing._repr_html_()
    assert knowing.unet is tiny.unet
    assert knowing.vae is tiny.vae
    pairs = zip(tiny.text_encoder.state_dict().items(), knowing.text_encoder.state_dict().items(), strict=True)
    assert all(name == other and one.data_ptr() == two.data_ptr() for (name, one), (other, two) in pairs)
    back = knowing.without_embeddings()
    assert back.fingerprint == tiny.fingerprint != knowing.fingerprint
    assert back.origin == tiny.origin
    assert torch.equal(back.encode_prompt(["a <one>"]), tiny.encode_prompt(["a <one>"]))
    assert tiny.without_embeddings() is tiny
    steps = tiny.with_embeddings(files["one"]).with_embeddings([files["three"], files["stem"], files["half"]])
    assert steps.origin == knowing.origin
    assert torch.equal(steps.encode_prompt(PROMPTS), knowing.encode_prompt(PROMPTS))


def test_the_fingerprint_tells_files_and_names_apart(tiny, files):
    given = [files["one"], ("<two>", files["one"]), files["three"]]
    assert len({tiny.fingerprint, *(tiny.with_embeddings(one).fingerprint for one in given)}) == 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloaded_it_is_the_same(tiny_folder, files, dtype):
    usual = {"device": "cpu", "dtype": dtype, "embeddings": list(files.values())}
    sd, off = masa.load(tiny_folder, **usual), masa.load(tiny_folder, **usual, offload=True)
    assert torch.equal(off.encode_prompt(PROMPTS), sd.encode_prompt(PROMPTS))
    assert off.fingerprint == sd.fingerprint
    one, other = (masa.sample(m, "a <one>", "a <three>", seed=0, **SETTINGS) for m in (sd, off))
    assert torch.equal(one.latents, other.latents)
    without = off.without_embeddings()
    assert torch.equal(without.encode_prompt(["<one>"]), sd.without_embeddings().encode_prompt(["<one>"]))
    assert torch.equal(off.encode_prompt(["<one>"]), sd.encode_prompt(["<one>"]))


def test_compiled_and_with_clip_skip(tiny_folder, tiny, files):
    compiled = tiny.compile(compiler="eager").with_embeddings(files["one"])
    assert compiled.compiled == "eager"
    assert torch.equal(compiled.encode_prompt(["<one>"]), tiny.with_embeddings(files["one"]).encode_prompt(["<one>"]))
    skipped = masa.load(tiny_folder, device="cpu", dtype="fp32", clip_skip=1, embeddings=files["one"])
    assert not torch.equal(skipped.encode_prompt(["<one>"]), compiled.encode_prompt(["<one>"]))


# ------------------------------------------------------------------------------------------------ in runs


def test_word_masks_and_prompt_to_prompt_see_all_vectors(knowing):
    """A word of three vectors: its mask is of three tokens, and a swap gives it its place."""
    masks = masa.MasaCtrl(1, mask=masa.WordMasks("<three>", "<three>"))
    record = masa.RecordAttention(words=["<three>"])
    usual = {"steps": 3, "seed": 0, "height": 64, "width": 64, "progress": False}
    prompts = ("a <three> sitting", "a <three> standing")
    out = masa.sample(knowing, *prompts, controls=[masks, record], **usual)
    assert out.masks[0]
    positions = knowing.tokenizer.token_positions(prompts[0], "<three>")
    assert positions == (2, 3, 4)
    by_place = masa.RecordAttention(words=[positions])
    maps = masa.sample(knowing, *prompts, controls=[masks, by_place], **usual).attention[1]
    assert any(torch.equal(next(iter(out.attention[1].values())), other) for other in maps.values())

    encode = knowing.tokenizer.encode
    matrix = replacement_map(*(TokenizedPrompt.of(prompt, encode) for prompt in ("a <three> sits", "a dog sits")))
    assert torch.equal(matrix[2:5, 2], torch.ones(3))
    assert matrix[5, 3] == 1
    swap = masa.PromptToPrompt("replace", reweight={"dog": 2.0})
    swapped, free = (
        masa.sample(knowing, "a <three> sits", "a dog sits", controls=controls, **usual) for controls in (swap, [])
    )
    assert not torch.equal(swapped.latents[1], free.latents[1])


def test_a_cache_of_other_embeddings_is_refused(knowing, tiny, files):
    cache = masa.record(knowing, "a <one>", seed=0, **SETTINGS)
    cached = masa.sample(knowing, target="a <three>", cache=cache, controls=masa.MasaCtrl(1), progress=False)
    whole = masa.sample(knowing, "a <one>", "a <three>", seed=0, **SETTINGS)
    assert torch.allclose(cached.latents, whole.latents, atol=1e-5)  # rows are batched otherwise
    for other in (tiny, tiny.with_embeddings(files["one"])):
        with pytest.raises(masa.MasaError, match="cache was recorded with"):
            masa.sample(other, target="a dog", cache=cache, progress=False)


def test_a_run_is_repeated_with_its_embeddings(tiny, files, tmp_path, monkeypatch):
    (tmp_path / "work" / "files").mkdir(parents=True)
    for name in ("one", "stem"):
        shutil.copy(files[name], tmp_path / "work" / "files" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path / "work")
    sd = tiny.with_embeddings(["files/one.safetensors", ("<pet>", "files/stem.safetensors")])
    first = masa.sample(sd, "a <one>", "a <pet>", seed=1, **SETTINGS)
    told = first.settings["embeddings"]
    assert [(t["path"], t["name"]) for t in told] == [
        ("files/one.safetensors", "<one>"),
        ("files/stem.safetensors", "<pet>"),
    ]
    first.save("out")
    monkeypatch.chdir(tmp_path)  # they are found near the picture
    picture = tmp_path / "work" / "out" / "target_0.png"
    again = masa.rerun(picture, progress=False)
    assert torch.equal(again.latents, first.latents)
    assert again.settings["fingerprint"] == first.settings["fingerprint"]
    file = tmp_path / "work" / "files" / "one.safetensors"
    save(file, {"<one>": vectors(WIDTH, seed=9)})
    with pytest.raises(masa.MasaError, match=r"embedding .*one.safetensors has changed since it made"):
        masa.rerun(picture, progress=False)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(masa.MasaError, match=r"one.safetensors has changed since it was loaded"):
        sd.with_embeddings(files["three"])
    file.unlink()
    with pytest.raises(masa.MasaError, match=r"the embedding files/one.safetensors, which .* is not there any more"):
        masa.rerun(picture, progress=False)


def test_a_picture_inverted_without_is_inverted_without_again(tiny, files, tmp_path):
    masa.sample(tiny, "a cat", seed=1, **(SETTINGS | {"controls": []})).source.save(tmp_path / "real.png")
    usual = {"steps": 2, "height": 64, "width": 64, "progress": False}
    trajectory = masa.invert(tiny, tmp_path / "real.png", "a <one>", **usual)
    sd = tiny.with_embeddings(files["one"])
    edit = masa.sample(sd, target="a <one>", trajectory=trajectory, seed=2, **SETTINGS)
    edit.save(tmp_path / "out")
    assert torch.equal(masa.rerun(tmp_path / "out" / "target_0.png", progress=False).latents, edit.latents)
    other = masa.invert(sd, tmp_path / "real.png", "a <one>", **usual)
    assert not torch.equal(other.latents, trajectory.latents)


def test_the_command_line(tiny_folder, files, tmp_path, monkeypatch, capsys):
    assert parse_embedding("a.safetensors") == "a.safetensors"
    assert parse_embedding("<x>=a.safetensors") == ("<x>", "a.safetensors")
    (tmp_path / "a=b.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_embedding("a=b.safetensors") == "a=b.safetensors"
    run = ["sample", "a <one>", "a <pet>", "-c", str(tiny_folder), "--steps", "2", "--height", "64", "--width", "64"]
    run += ["--seed", "3", "--device", "cpu", "--dtype", "fp32", "--start-step", "1", "-q"]
    given = ["--embedding", str(files["one"]), "--embedding", f"<pet>={files['three']}"]
    assert main([*run, "-o", "with", *given]) == 0
    assert main([*run, "-o", "without"]) == 0
    found = masa.Result.load("with")
    assert [told["name"] for told in found.settings["embeddings"]] == ["<one>", "<pet>"]
    assert not torch.equal(found.latents, masa.Result.load("without").latents)
    assert main(["rerun", "with/target_0.png", "-o", "again", "-q"]) == 0
    assert torch.equal(masa.Result.load("again").latents, found.latents)
    capsys.readouterr()
    assert main([*run, "-o", "no", "--embedding", "gone.safetensors"]) == 2
    assert "no embedding at gone.safetensors" in capsys.readouterr().err
