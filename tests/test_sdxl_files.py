"""SDXL-Turbo from its files to pictures: downloads, checks, prompts and their cache, decoding, drawing."""
import http.server
import threading
import urllib.error
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sample
import tiny_turbo
from nanodd import cli, files, processes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import autoencoder
from nanodd.networks.sdxl import generator, prompts, text, tokenizer, unet, weights
from nanodd.sampling import loading

# Tiny-ImageNet's classes
TINY = """
    n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384 n01774750
    n01784675 n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731 n01983481 n01984695
    n02002724 n02056570 n02058221 n02074367 n02085620 n02094433 n02099601 n02099712 n02106662 n02113799
    n02123045 n02123394 n02124075 n02125311 n02129165 n02132136 n02165456 n02190166 n02206856 n02226429
    n02231487 n02233338 n02236044 n02268443 n02279972 n02281406 n02321529 n02364673 n02395406 n02403003
    n02410509 n02415577 n02423022 n02437312 n02480495 n02481823 n02486410 n02504458 n02509815 n02666196
    n02669723 n02699494 n02730930 n02769748 n02788148 n02791270 n02793495 n02795169 n02802426 n02808440
    n02814533 n02814860 n02815834 n02823428 n02837789 n02841315 n02843684 n02883205 n02892201 n02906734
    n02909870 n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304 n02999410 n03014705
    n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701 n03201208 n03250847
    n03255030 n03355925 n03388043 n03393912 n03400231 n03404251 n03424325 n03444034 n03447447 n03544143
    n03584254 n03599486 n03617480 n03637318 n03649909 n03662601 n03670208 n03706229 n03733131 n03763968
    n03770439 n03796401 n03804744 n03814639 n03837869 n03838899 n03854065 n03891332 n03902125 n03930313
    n03937543 n03970156 n03976657 n03977966 n03980874 n03983396 n03992509 n04008634 n04023962 n04067472
    n04070727 n04074963 n04099969 n04118538 n04133789 n04146614 n04149813 n04179913 n04251144 n04254777
    n04259630 n04265275 n04275548 n04285008 n04311004 n04328186 n04356056 n04366367 n04371430 n04376876
    n04398044 n04399382 n04417672 n04456115 n04465501 n04486054 n04487081 n04501370 n04507155 n04532106
    n04532670 n04540053 n04560804 n04562935 n04596742 n04597913 n06596364 n07579787 n07583066 n07614500
    n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607 n07749582 n07753592 n07768694
    n07871810 n07873807 n07875152 n07920052 n09193705 n09246464 n09256479 n09332890 n09428293 n12267677
""".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the six files of a tiny SDXL-Turbo."""
    return tiny_turbo.write(tmp_path / "sdxl-turbo", monkeypatch)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache: the folder in which fetched files of SDXL-Turbo lie."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints/sdxl-turbo"


def run_of(bf16=False):
    return cli.Run("a test", torch.device("cpu"), 0, False, bf16, False, False, "mse")


# ----------------------------------------------------------------------------------------------------
# 1. Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of `folder`; sends no more than `limit` bytes at once; `asked`: first byte of each."""
    folder, limit, ranges = None, None, True

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.server.folder / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.ranges else 0
            self.server.asked.append(start)
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if "Range" in self.headers and self.server.ranges else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:][:self.server.limit])

        def log_message(self, *_):
            """Not on stderr."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.asked = []


@pytest.fixture
def server(tmp_path):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        server.folder = tmp_path / "served"
        server.folder.mkdir()
        server.url = f"http://127.0.0.1:{server.server_port}/"
        (server.folder / "data").write_bytes(bytes(k % 251 for k in range(100_000)))
        yield server
        server.shutdown()


def test_a_download_that_broke_off_goes_on_where_it_stopped(server, tmp_path):
    path, part = tmp_path / "new/data", tmp_path / "new/data.part"
    server.limit = 30_000
    for end in (30_000, 59_999):                                # the second time from 29,999 on
        said = f"broke after {end:,} of 100,000 bytes.*resumes the download; or ask a friend"
        with pytest.raises(UserError, match=said):
            files.download(server.url + "data", path, "ask a friend")
        assert part.stat().st_size == end and not path.exists()
    server.limit = None
    files.download(server.url + "data", path, "ask a friend")
    assert path.read_bytes() == (server.folder / "data").read_bytes() and not part.exists()
    assert server.asked == [0, 29_999, 59_998]                  # the last byte is sent again


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "data.part").write_bytes(bytes(200_000))        # longer, and of another file
    server.ranges = False
    files.download(server.url + "data", tmp_path / "data", "")
    assert (tmp_path / "data").read_bytes() == (server.folder / "data").read_bytes()


def test_a_part_that_is_complete_or_too_long_does_no_harm(server, tmp_path):
    (tmp_path / "data.part").write_bytes((server.folder / "data").read_bytes())
    files.download(server.url + "data", tmp_path / "data", "")
    assert (tmp_path / "data").read_bytes() == (server.folder / "data").read_bytes()
    (tmp_path / "data.part").write_bytes(bytes(200_000))
    with pytest.raises(UserError, match="416"):
        files.download(server.url + "data", tmp_path / "data", "")
    assert not (tmp_path / "data.part").exists()                # the next time starts over


def test_the_six_files_are_fetched_once_into_the_hub_cache(folder, hub, server, monkeypatch, capsys):
    server.folder = folder
    monkeypatch.setattr(weights, "URL", server.url)
    assert weights.locate() == hub
    for name in weights.FILES:
        assert (hub / name).read_bytes() == (folder / name).read_bytes()
    assert f"fetching {weights.UNET}, 0.0" in capsys.readouterr().out and len(server.asked) == 6
    (hub / weights.VAE).unlink()
    assert weights.locate() == hub and len(server.asked) == 7   # what is there is not fetched again


def test_a_fetched_file_with_other_contents_is_a_sentence(folder, hub, server, monkeypatch):
    server.folder = folder
    monkeypatch.setattr(weights, "URL", server.url)
    data = bytearray((folder / weights.VAE).read_bytes())
    data[-1] ^= 1
    (folder / weights.VAE).write_bytes(data)
    with pytest.raises(UserError, match=r"published size, but other contents \(sha256 .*: delete it"):
        weights.locate()
    (folder / weights.VAE).unlink()
    (hub / weights.VAE).unlink()
    with pytest.raises(UserError, match=f"cannot fetch {server.url}{weights.VAE} .*404.*--weights DIR"):
        weights.locate()


def test_without_a_network_a_sentence_names_weights(hub, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError) as stop:
        weights.locate()
    said = str(stop.value)
    assert "cannot fetch https://huggingface.co/stabilityai/sdxl-turbo/resolve/main/unet/diffusion_" in said
    assert "no route to host" in said and "tokenizer/merges.txt elsewhere" in said and "--weights DIR" in said


def test_only_the_first_process_fetches(folder, hub, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "world", lambda: 2)
    hub.parent.mkdir(parents=True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list",
                        lambda _, **group: folder.rename(hub))
    monkeypatch.setattr(files, "download", None)
    assert weights.locate() == hub


# ----------------------------------------------------------------------------------------------------
# 2. Files of the user's, and how they are loaded


def test_a_folder_of_the_users_is_checked_for_names_and_sizes(folder, tmp_path):
    assert weights.locate(str(folder)) == folder
    with pytest.raises(UserError, match="there is no folder .*gone: --weights takes one with unet/"):
        weights.locate(tmp_path / "gone")
    size = (folder / weights.UNET).stat().st_size
    (folder / weights.UNET).write_bytes((folder / weights.UNET).read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{weights.UNET} has 1,000 bytes instead of {size:,}: it is cut off"):
        weights.locate(folder)
    (folder / weights.UNET).unlink()
    with pytest.raises(UserError, match=f"{weights.UNET} is missing: download it from https://.*{weights.UNET}"):
        weights.locate(folder)


def test_hashes_are_checked_on_request(folder):
    for name in weights.FILES:
        weights.check_hash(folder, name)
    path = folder / weights.TEXT.format("text_encoder")
    before, data = weights.fingerprint(path), bytearray(path.read_bytes())
    assert weights.fingerprint(path) == before
    data[-1] ^= 1
    path.write_bytes(data)
    weights.check_size(folder, weights.TEXT.format("text_encoder"))
    with pytest.raises(UserError, match="other contents"):
        weights.check_hash(folder, weights.TEXT.format("text_encoder"))
    data = [byte ^ 255 for byte in data]
    path.write_bytes(bytes(data))
    assert weights.fingerprint(path) != before                  # other weights of the same layout


def test_a_damaged_or_foreign_file_is_a_sentence(folder):
    path = folder / weights.UNET
    with pytest.raises(UserError, match="does not fit the network: .* is missing"):
        weights.load(autoencoder.Autoencoder, path, "cpu", torch.float32)
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(UserError, match="is damaged"):
        weights.load(unet.UNet, path, "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_copy_of_the_weights_is_in_memory(folder, monkeypatch, dtype):
    """Of the tensors as they are in the file, one is alive at a time; the network starts without numbers."""
    alive, peak, real = weakref.WeakSet(), [], safetensors.safe_open

    class Spy:
        def __init__(self, *args, **how):
            self.file = real(*args, **how)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return self.file.__exit__(*_)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            peak.append(len(alive))
            return tensor
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    network = weights.load(unet.UNet, folder / weights.UNET, "cpu", dtype)
    assert len(peak) == len(network.state_dict()) and max(peak) == 1
    assert not network.training
    for name, tensor in safetensors.torch.load_file(folder / weights.UNET).items():
        loaded = network.state_dict()[name]
        assert loaded.dtype == dtype and torch.equal(loaded, tensor.to(dtype)) and not loaded.requires_grad


# ----------------------------------------------------------------------------------------------------
# 3. Prompts


def test_class_names_become_words():
    assert prompts.prompts_of(["lawn_mower", "maple_tree", "apple"]) == ["lawn mower", "maple tree", "apple"]
    assert prompts.prompts_of(["n01443537", "My cat", "n1"], "a photo of a {}, {}!") == [
        "a photo of a goldfish, goldfish!", "a photo of a My cat, My cat!", "a photo of a n1, n1!"]


def test_all_wordnet_ids_of_imagenet_and_tiny_imagenet_have_names():
    assert len(set(TINY)) == 200 and sorted(TINY) == TINY
    names = prompts.prompts_of(TINY)
    assert len({name.lower() for name in names}) == 200
    assert [names[k] for k in (0, 28, 95, 199)] == ["goldfish", "German shepherd", "crane", "acorn"]
    names = [name.lower() for name in prompts.prompts_of(archives.imagenet_classes())]
    assert {name for name in names if names.count(name) > 1} == {"crane", "cardigan", "maillot"}
    assert not any("_" in name or "," in name for name in names)
    for subset in ("imagenette", "imagewoof", "imageidc", "imagenet100"):
        assert len({name.lower() for name in prompts.prompts_of(archives.SUBSETS[subset])}) in (10, 100)


@pytest.mark.parametrize("classes, template, said", [
    (["cat"], "a photo", r"'a photo' has no \{\}"), (["cat", "n99999999"], "{}", "n99999999 looks like a")])
def test_a_prompt_without_a_place_and_an_unknown_id_are_sentences(classes, template, said):
    with pytest.raises(UserError, match=said):
        prompts.prompts_of(classes, template)


def test_each_prompt_is_encoded_by_both_encoders(folder, tmp_path):
    context, pooled = generator.encode_classes(["cat", "a dog"], folder, "cpu", tmp_path / "cache")
    assert context.shape == (2, 77, 64 + 128) and pooled.shape == (2, 128)
    assert context.dtype == pooled.dtype == torch.float16
    tokens = tokenizer.Tokenizer(folder / "tokenizer")
    for k, prompt in enumerate(["cat", "a dog"]):
        hidden = []
        for which, pad in (("text_encoder", tokens.end), ("text_encoder_2", 0)):    # they pad differently
            encoder = weights.load(lambda which=which: text.TextEncoder(which),
                                   folder / weights.TEXT.format(which), "cpu", torch.float32)
            h, last = encoder(torch.tensor([tokens.ids_of(prompt, pad)]))
            hidden.append(h[0])
        assert torch.allclose(context[k].float(), torch.cat(hidden, dim=1), atol=2e-3)
        assert torch.allclose(pooled[k].float(), last[0], atol=2e-3)


def test_one_encoder_is_in_memory_at_a_time(folder, tmp_path, monkeypatch):
    alive, build = weakref.WeakSet(), text.TextEncoder

    def counted(which):
        assert not alive
        encoder = build(which)
        alive.add(encoder)
        return encoder
    monkeypatch.setattr(text, "TextEncoder", counted)
    generator.encode_classes(["cat"], folder, "cpu", tmp_path / "cache")
    assert not alive


def test_a_second_run_loads_no_encoder(folder, tmp_path, monkeypatch):
    path, again = tmp_path / "cache", ["cat", "dog"]
    first = generator.encode_classes(again, folder, "cpu", path)

    def never(*_):
        raise AssertionError("an encoder was loaded")
    with monkeypatch.context() as patch:
        patch.setattr(text, "TextEncoder", never)
        second = generator.encode_classes(again, folder, "cpu", path)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(AssertionError):
            generator.encode_classes(["dog", "cat"], folder, "cpu", path)
    tensors = safetensors.torch.load_file(folder / weights.TEXT.format("text_encoder"))
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}        # other weights, the same prompts
    safetensors.torch.save_file(tensors, folder / weights.TEXT.format("text_encoder"), {"format": "pt"})
    assert not torch.equal(generator.encode_classes(again, folder, "cpu", path)[0], first[0])


# ----------------------------------------------------------------------------------------------------
# 4. From latents to pictures


def test_latents_are_divided_by_their_own_scale(folder):
    z = torch.randn(1, 4, 2, 2)
    sdxl = autoencoder.load_autoencoder(folder / weights.VAE, scale=generator.SCALE)
    other = autoencoder.load_autoencoder(folder / weights.VAE)
    assert generator.SCALE == .13025 and other.scale == autoencoder.SCALE == .18215
    assert torch.allclose(sdxl.decode(.13025 * z), other.decode(.18215 * z), atol=1e-5)


@pytest.mark.parametrize("contrast, most, mean", [(0.6, 1, 0.15), (1.2, 8, 0.3)])     # 1.2: beyond white
def test_pictures_become_small_as_pillow_makes_them(contrast, most, mean):
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 40, 40), 512, mode="bicubic")
    x = contrast * (2 * smooth - 1 + 0.1 * torch.randn(2, 3, 512, 512))
    for size in (32, 64):
        ours = imageset.to_uint8(generator.resized(x, size, 3))
        for k, picture in enumerate(imageset.to_uint8(x)):
            pillow = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((size, size))
            pillow = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
            difference = (ours[k].float() - pillow.float()).abs()
            assert difference.max() <= most and difference.mean() < mean


def test_a_grey_data_set_gets_grey_pictures():
    x = torch.tensor([1., -1., 0.]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    grey = generator.resized(x, 8, 1)
    assert grey.shape == (1, 1, 8, 8)
    assert torch.allclose(grey, torch.tensor(.299 - .587), atol=1e-3)      # ITU-R 601's weights


def test_decoding_in_chunks_is_decoding_at_once(folder, monkeypatch):
    vae = autoencoder.load_autoencoder(folder / weights.VAE, scale=generator.SCALE)
    z = torch.randn(5, 4, 4, 4)
    whole = generator.decode(vae, 8, 3, z)
    assert whole.shape == (5, 3, 8, 8)
    monkeypatch.setattr(generator, "CHUNK", 2)
    assert torch.allclose(generator.decode(vae, 8, 3, z), whole, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# 5. All that drawing needs


def test_each_class_gets_its_own_prompt():
    asked = []

    def network(*inputs):
        asked.append(inputs)
        return inputs[0]
    context, pooled = torch.arange(3.).view(3, 1, 1).expand(3, 77, 2), torch.arange(3.).view(3, 1)
    model = generator.Turbo(None, context, pooled)
    model.unet = network
    x, t, y = torch.randn(2, 4, 4, 4), torch.full((2,), 999.), torch.tensor([2, 0])
    assert torch.equal(model(x, t, y), x)
    assert torch.equal(asked[0][1], t)
    assert asked[0][2][:, 5, 1].tolist() == asked[0][3].flatten().tolist() == [2, 0]


def draw(data, folder, items, steps=(999,), template="{}", bf16=False):
    """Pictures (n, C, H, W) uint8 of items, pairs (label, index); and the Trained that drew them."""
    trained = loading.Trained(**generator.for_sampling(folder, template, data, run_of(bf16)))
    sampler = sample.sampler_of("turbo", len(steps), schedule=trained.schedule)
    assert sampler.times == list(steps)
    return sample.draw(trained, 0, sampler, items), trained


def test_a_folder_of_weights_draws_pictures(folder, pictures, capsys):
    data, items = datasets.load(str(pictures)), [(1, 0), (0, 0), (0, 1)]
    images, trained = draw(data, folder, items)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8     # the small recipe's size
    assert "encoding 2 prompts into out/pictures/sdxl-turbo-prompts.safetensors" in capsys.readouterr().out
    header = trained.header
    assert header["classes"] == header["extra_settings"]["prompts"] == ["ant", "bee"]
    assert header["rows"] == [0, 1, -1]
    assert header["data"] == "pictures" and header["recipe"] == "folder" and header["guidance"] == 1
    assert header["config"] == {"channels": 4, "size": 4} and not trained.bf16
    assert trained.decode.args[0].scale == .13025
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    again, _ = draw(data, folder, items[::-1])
    assert (again.flip(0).int() - images.int()).abs().max() <= 1 and "encoding" not in capsys.readouterr().out
    two_steps, _ = draw(data, folder, items, steps=(999, 499))
    assert not torch.equal(two_steps, images)


def test_the_network_sees_the_prompt_of_the_class(folder, pictures):
    data = datasets.load(str(pictures))
    _, trained = draw(data, folder, [(0, 0)])
    x, t = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1), torch.full((2,), 999.)
    out = trained.network(x, t, torch.tensor([0, 1]))
    assert not torch.allclose(out[0], out[1], atol=1e-5)
    other = draw(data, folder, [(0, 0)], template="a photo of a {}")[1]
    assert other.header["weights"] != trained.header["weights"]
    assert other.header["extra_settings"]["prompts"] == ["a photo of a ant", "a photo of a bee"]


def test_digits_are_drawn_in_grey_and_bfloat16(folder):
    images, trained = draw(datasets.load("digits"), folder, [(3, 0)], bf16=True)
    assert images.shape == (1, 1, 8, 8) and trained.bf16 and len(trained.header["classes"]) == 10
    kinds = {tensor.dtype for tensor in trained.network.state_dict().values()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_a_lack_of_memory_is_a_sentence(folder, pictures, monkeypatch, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(weights, "load", fail)
    data = datasets.load(str(pictures))
    with pytest.raises(UserError, match="into the memory of cpu: .* takes 10.3 GB, which --bf16 halves"):
        generator.for_sampling(folder, "{}", data, run_of())
    with pytest.raises(UserError, match="takes 5.1 GB$"):
        generator.for_sampling(folder, "{}", data, run_of(bf16=True))
    monkeypatch.setattr(weights, "load", lambda *_: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):             # a bug keeps its traceback
        generator.for_sampling(folder, "{}", data, run_of())
