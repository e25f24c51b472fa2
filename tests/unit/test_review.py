"""The review server over real HTTP, its files, and what is left of them after a kill."""

import http.client
import json
import math
import os
import shutil
import signal
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from review_work import make_work

from tag2mask.analyse.work import open_work
from tag2mask.data.decisions import Decision, append_decision, decisions_path, mend, read_decisions, reviewed_mask
from tag2mask.data.maps import Maps, map_path, read_maps
from tag2mask.errors import UserError
from tag2mask.review.certainty import certainty, constant_of
from tag2mask.review.server import LARGEST, ReviewServer
from tag2mask.review.session import Review, open_review, view_size
from tag2mask.stages.labels import mask_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("review"))


@pytest.fixture
def work(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "work")


class Client:
    """Asks a running server, by default as its own page would."""

    def __init__(self, server):
        self.server, self.host = server, f"127.0.0.1:{server.server_port}"

    def ask(self, path, method="GET", body=None, token=None, **headers):
        """(status, headers, body); `headers` replace those of a browser, None leaves one out."""
        sent = {"Host": self.host, "Origin": f"http://{self.host}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        try:
            connection.putrequest(method, f"/{token or self.server.token}/{path}", skip_host=True)
            data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            if body is not None:
                sent.setdefault("Content-Length", str(len(data)))
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders()
            connection.send(data)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def decide(self, number, decision, scores=None, **headers):
        value = {"image": number, "decision": decision, "scores": scores or {}}
        return self.ask("decide", "POST", value, **headers)[0]

    def state(self):
        status, _, body = self.ask("state.json")
        assert status == 200
        return json.loads(body)


@pytest.fixture
def client(work):
    with open_review(work) as review, ReviewServer(review) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Client(server)
        server.shutdown()
        thread.join()


def lines(work):
    return [json.loads(line) for line in decisions_path(work).read_text().splitlines()]


def loop_certainty(stored, score):
    """The definition, pixel by pixel."""
    leads = []
    for y in range(stored.maps.shape[1]):
        for x in range(stored.maps.shape[2]):
            values = sorted((float(m[y, x]) for m in stored.maps), reverse=True)
            second = values[1] if len(values) > 1 else 0.0
            if values[0] > score:
                leads.append((values[0] - max(second, score)) / (1 - score))
            else:
                leads.append((score - values[0]) / score)
    least = min(float(stored.logits[k]) for k in stored.classes)
    return sum(leads) / len(leads) * (1 if math.isnan(least) else 1 / (1 + math.exp(-least)))


class TestOrder:
    @pytest.mark.parametrize("classes", [[1], [0, 2], [0, 1, 2]])
    @pytest.mark.parametrize("score", [0.3, 0.7])
    def test_certainty_is_that_of_a_loop(self, classes, score):
        noise = np.random.default_rng(len(classes))
        maps = noise.random((len(classes), 5, 4)).astype(np.float16)
        maps[:, 0] = 0.5  # ties
        stored = Maps(np.array(classes), maps, (20, 16), noise.normal(size=3).astype(np.float32))
        assert certainty(stored, score) == pytest.approx(loop_certainty(stored, score), abs=1e-5)

    def test_certainty_at_the_edges(self):
        nothing = np.full(3, np.nan, np.float32)
        ones = np.ones((1, 4, 4), np.float16)
        assert certainty(Maps(np.array([0]), ones, (16, 16), nothing), 0.4) == pytest.approx(1)
        assert certainty(Maps(np.array([0]), ones * 0, (16, 16), nothing), 0.4) == pytest.approx(1)
        assert certainty(Maps(np.array([0]), ones * 0, (16, 16), nothing), 0.0) == 0
        two = np.concatenate([ones, ones])
        assert certainty(Maps(np.array([0, 1]), two, (16, 16), nothing), 0.4) == 0  # two classes that both want all
        assert certainty(Maps(np.zeros(0, np.int64), ones[:0], (16, 16), nothing), 0.4) == 1
        unsure = np.array([-60.0, 0, 0], np.float32)
        assert 0 <= certainty(Maps(np.array([0]), ones, (16, 16), unsure), 0.4) < 1e-6

    @pytest.mark.parametrize("alpha", [0.5, 1, 4, 16])
    def test_a_power_has_a_constant(self, alpha):
        score = constant_of(alpha)
        values = np.linspace(0, 1, 1001)
        away = abs(values - score) > 1e-6
        assert ((values > score) == (values > (1 - values) ** alpha))[away].all()

    def test_images_come_from_least_to_most_certain(self, client, work):
        images = client.state()["images"]
        assert len(images) == 12
        values = [image["certainty"] for image in images]
        assert values == sorted(values) and values[0] < values[-1]
        folder = next(work.glob("cams-*"))
        for image in images:
            stored = read_maps(map_path(folder, image["name"]))
            if len(stored.classes):
                assert image["certainty"] == pytest.approx(loop_certainty(stored, 0.3), abs=2e-4)
            else:
                assert image["certainty"] == 1 and image["tags"] == []

    def test_a_large_image_is_shown_smaller(self):
        assert view_size(100, 50) == (100, 50)
        assert view_size(3200, 1600) == (1600, 800)
        assert view_size(1, 5000) == (1, 1600)


class TestDecisionFile:
    def test_the_last_line_of_an_image_counts(self, tmp_path):
        path = tmp_path / "decisions.jsonl"
        assert read_decisions(path) == {}
        append_decision(path, "a/ö", Decision("accepted"))
        append_decision(path, "b", Decision("flagged", {"cat": 0.25}))
        append_decision(path, "a/ö", Decision("rejected"))
        assert read_decisions(path) == {"b": Decision("flagged", {"cat": 0.25}), "a/ö": Decision("rejected")}
        first = json.loads(path.read_text("utf-8").splitlines()[0])
        assert set(first) == {"image", "decision", "scores", "time"} and first["image"] == "a/ö"

    @pytest.mark.parametrize("cut", [1, 2, 20, 60])
    def test_a_torn_end_is_cut_off(self, tmp_path, cut):
        path = tmp_path / "decisions.jsonl"
        append_decision(path, "a", Decision("accepted"))
        whole = path.read_bytes()
        append_decision(path, "b", Decision("rejected"))
        path.write_bytes(path.read_bytes()[:-cut])
        kept = {"a"} | ({"b"} if cut == 1 else set())  # only the end of the line is missing
        assert set(read_decisions(path)) == kept
        mend(path)
        assert path.read_bytes().startswith(whole) and path.read_bytes().endswith(b"\n")
        append_decision(path, "c", Decision("flagged"))
        assert set(read_decisions(path)) == kept | {"c"}

    @pytest.mark.parametrize(
        "line",
        ["no json", "[]", '{"decision": "accepted"}', '{"image": "a", "decision": "fine"}', '{"image": "a"}',
         '{"image": "a", "decision": "accepted", "scores": {"cat": 1.5}}',
         '{"image": "a", "decision": "accepted", "scores": {"cat": true}}',
         '{"image": "a", "decision": "accepted", "scores": [1]}'],
    )  # fmt: skip
    def test_a_bad_line_is_named(self, tmp_path, line):
        path = tmp_path / "decisions.jsonl"
        path.write_text(f'{{"image": "x", "decision": "accepted"}}\n{line}\n{{"image": "y", "decision": "flagged"}}\n')
        with pytest.raises(UserError, match=r"decisions\.jsonl: line 2 is no decision"):
            read_decisions(path)

    def test_a_full_disk_leaves_whole_lines(self, tmp_path):
        resource = pytest.importorskip("resource")
        path = tmp_path / "decisions.jsonl"
        append_decision(path, "a", Decision("accepted"))
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
            with pytest.raises(OSError):
                append_decision(path, "b", Decision("accepted"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes().endswith(b"}\n") and set(read_decisions(path)) == {"a"}


class TestWhoMayAsk:
    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:8765", "127.0.0.1@evil",
         "", "0.0.0.0", "192.168.0.1:8765", None],
    )  # fmt: skip
    @pytest.mark.parametrize("path", ["", "state.json", "photo/0", "page.js"])
    def test_other_hosts_are_refused(self, client, host, path):
        status, _, body = client.ask(path, Host=host)
        assert status == 403 and b"127.0.0.1 and localhost only" in body

    def test_a_tunnel_may_have_another_port(self, client):
        assert client.ask("state.json", Host="localhost:9999")[0] == 200

    def test_it_listens_on_loopback_alone(self, client):
        assert client.server.server_address[0] == "127.0.0.1"
        with socket.socket() as other, pytest.raises(OSError):
            other.settimeout(2)
            other.connect(("127.0.0.2", client.server.server_port))

    @pytest.mark.parametrize("token", ["x" * 32, "é", "state.json"])
    def test_a_wrong_token_is_refused(self, client, token):
        from urllib.parse import quote

        for path, method in (("", "GET"), ("state.json", "GET"), ("decide", "POST")):
            status, _, body = client.ask(path, method, body={} if method == "POST" else None, token=quote(token))
            assert status == 403 and client.server.token.encode() not in body

    def test_the_bare_address_tells_nothing(self, client):
        connection = http.client.HTTPConnection("127.0.0.1", client.server.server_port)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.status == 403 and client.server.token.encode() not in answer.read()
        connection.close()

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", None, "https://{host}", "http://{host}.evil"])
    def test_what_changes_something_must_come_from_the_page(self, client, work, origin):
        given = origin and origin.format(host=client.host)
        assert client.decide(0, "accepted", Origin=given) == 403
        value = {"class": client.state()["classes"][0]["name"], "score": 0.5}
        assert client.ask("class", "POST", value, Origin=given)[0] == 403
        assert not decisions_path(work).exists() and client.state()["classScores"] == {}

    def test_the_token_is_secret_and_stays(self, client, work):
        path = work / "review/token"
        assert path.stat().st_mode & 0o077 == 0 and path.read_text() == client.server.token
        assert len(client.server.token) >= 32

    def test_answers_carry_their_fences(self, client):
        for path in ("", "state.json", "photo/0", "nothing"):
            _, headers, _ = client.ask(path)
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in headers and "Python" not in headers["Server"]


class TestWhatIsServed:
    @pytest.mark.parametrize(
        "path",
        ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "photo/../../scenes.run.json", "photo/-1", "photo/999",
         "photo/0x1", "photo/1e3", "photo/", "photo/train/0000", "scenes.run.json", "review/token", "token",
         "server.py", "mask/0/..", "page.css/../server.py", "/etc/passwd", "photo/%30", "photo/0?x=1"],
    )  # fmt: skip
    def test_nothing_by_path(self, client, path):
        status, _, body = client.ask(path)
        assert status == 404 and len(body) < 100

    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
    def test_other_methods(self, client, method):
        status, headers, _ = client.ask("state.json", method)
        assert status == 405 and headers["Allow"] == "GET, HEAD, POST"

    def test_unknown_methods(self, client):
        assert client.ask("state.json", "BREW")[0] == 501

    def test_head(self, client):
        status, headers, body = client.ask("photo/0", "HEAD")
        assert status == 200 and int(headers["Content-Length"]) > 100 and body == b""

    @pytest.mark.parametrize(
        "body, headers, status",
        [
            (b"x" * (LARGEST + 1), {}, 413),
            (b"{}", {"Content-Length": "99999999999"}, 413),
            (b"{}", {"Content-Length": "-1"}, 411),
            (b"{}", {"Content-Length": None, "Transfer-Encoding": "chunked"}, 411),
            (b"{}", {"Content-Type": "text/plain"}, 415),
            (b"no json", {}, 400),
            (b"[" * 60000, {}, 400),
            (b"[]", {}, 400),
            (b"{}", {}, 400),
            (b'{"image": true, "decision": "accepted"}', {}, 400),
            (b'{"image": 999, "decision": "accepted"}', {}, 400),
            (b'{"image": -1, "decision": "accepted"}', {}, 400),
            (b'{"image": 0, "decision": "perfect"}', {}, 400),
            (b'{"image": 0, "decision": "accepted", "scores": {"unicorn": 0.5}}', {}, 400),
            (b'{"image": 0, "decision": "accepted", "scores": {"cat": NaN}}', {}, 400),
            (b'{"image": 0, "decision": "accepted", "scores": {"cat": "0.5"}}', {}, 400),
        ],
    )
    def test_bodies_that_are_refused(self, client, work, body, headers, status):
        assert client.ask("decide", "POST", body, **headers)[0] == status
        assert not decisions_path(work).exists() and not (work / "review/masks").exists()

    @pytest.mark.parametrize("value", [{}, {"class": "unicorn", "score": 0.5}, {"class": 3}])
    def test_classes_that_are_refused(self, client, value):
        assert client.ask("class", "POST", value)[0] == 400

    @pytest.mark.parametrize("score", [1, -0.1, "0.5", True, [], float("nan")])
    def test_scores_that_are_refused(self, client, score):
        name = client.state()["classes"][0]["name"]
        assert client.ask("class", "POST", {"class": name, "score": score})[0] == 400
        assert client.state()["classScores"] == {}

    def test_the_page_is_whole_and_fetches_nothing_from_elsewhere(self, client):
        for name in ("", "page.css", "page.js", "mask.js", "store.js", "icon.svg"):
            status, _, body = client.ask(name)
            text = body.decode().replace("http://www.w3.org/2000/svg", "")
            assert status == 200 and len(text) > 100 and "://" not in text
            assert "innerHTML" not in text and "style=" not in text and "onclick" not in text

    def test_pictures(self, client, finished):
        image = client.state()["images"][0]
        mask = np.asarray(Image.open(mask_path(next(finished.glob("crf-*")), image["name"])))
        status, _, body = client.ask("mask/0")
        assert status == 200 and np.frombuffer(body[:8], "<u4").tolist() == [48, 48]
        assert (np.frombuffer(body[8:], np.uint8).reshape(48, 48) == mask).all()
        stored = read_maps(map_path(next(finished.glob("cams-*")), image["name"]))
        _, _, body = client.ask("maps/0")
        assert np.frombuffer(body[:12], "<u4").tolist() == list(stored.maps.shape)
        assert np.frombuffer(body[12 + 4 * len(stored.classes) :], "<f2").tolist() == stored.maps.ravel().tolist()
        status, headers, _ = client.ask("photo/0")
        assert status == 200 and headers["Content-Type"] == "image/jpeg"

    def test_a_map_that_is_gone_is_said(self, client, work):
        name = client.state()["images"][0]["name"]
        map_path(next(work.glob("cams-*")), name).unlink()
        status, _, body = client.ask("maps/0")
        assert status == 500 and b"no maps of this image" in body
        assert client.ask("photo/0")[0] == 200  # the server lives on


def by_class(stored, scores, classes):
    """The mask in a loop over the pixels of the maps at full size."""
    full = stored.full().numpy()
    mask = np.zeros(stored.size, np.uint8)
    for y in range(stored.size[0]):
        for x in range(stored.size[1]):
            best = int(np.argmax(full[:, y, x]))
            k = int(stored.classes[best])
            if full[best, y, x] > np.float32(scores[classes[k]]):
                mask[y, x] = k + 1
    return mask


class TestDecisions:
    def test_a_decision_is_stored_at_once(self, client, work):
        name = client.state()["images"][2]["name"]
        assert client.decide(2, "accepted") == 200
        assert [(line["image"], line["decision"], line["scores"]) for line in lines(work)] == [(name, "accepted", {})]
        assert client.state()["images"][2]["decision"] == "accepted"
        assert not reviewed_mask(work, name).exists()  # the mask is the one of the run

    def test_own_scores_make_a_mask(self, client, work, finished):
        state = client.state()
        classes = [known["name"] for known in state["classes"]]
        number = next(n for n, image in enumerate(state["images"]) if len(image["tags"]) > 1)
        image = state["images"][number]
        stored = read_maps(map_path(next(finished.glob("cams-*")), image["name"]))
        for base in (0.2, 0.6):
            scores = {name: base + 0.1 * k for k, name in enumerate(image["tags"])}
            assert client.decide(number, "accepted", scores) == 200
            picture = Image.open(reviewed_mask(work, image["name"]))
            assert picture.mode == "P" and (np.asarray(picture) == by_class(stored, scores, classes)).all()
        assert client.decide(number, "undecided") == 200
        assert not reviewed_mask(work, image["name"]).exists()
        assert len(lines(work)) == 3 and list((work / "review").rglob("*.tmp")) == []

    def test_scores_are_for_all_tags(self, client, work):
        images = client.state()["images"]
        number = next(n for n, image in enumerate(images) if len(image["tags"]) > 1)
        assert client.decide(number, "accepted", {images[number]["tags"][0]: 0.5}) == 400
        assert not decisions_path(work).exists()

    def test_a_score_of_a_class_is_kept(self, client, work):
        name = client.state()["classes"][1]["name"]
        assert client.ask("class", "POST", {"class": name, "score": 0.45})[0] == 200
        assert Review(open_work(work), "masks").class_scores == {name: 0.45}
        assert client.ask("class", "POST", {"class": name, "score": None})[0] == 200
        assert client.state()["classScores"] == {}

    def test_many_at_once(self, client, work):
        threads = [threading.Thread(target=client.decide, args=(n, "accepted")) for n in range(12) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(lines(work)) == 24 and client.server.review.counts()["accepted"] == 12


class TestOneAtATime:
    def test_a_second_server_is_refused(self, work):
        with open_review(work), pytest.raises(UserError, match="another `tag2mask review`"), open_review(work):
            pass

    def test_a_port_that_is_taken(self, client, finished, tmp_path):
        other = shutil.copytree(finished, tmp_path / "other")
        with open_review(other) as review, pytest.raises(UserError, match="--port"):
            ReviewServer(review, client.server.server_port)

    def test_decisions_on_other_masks_are_not_mixed_up(self, work):
        with open_review(work) as review:
            review.decide(0, "accepted", {})
        with (
            pytest.raises(UserError, match=r"decisions on the masks of crf-.* --stage"),
            open_review(work, None, "plain"),
        ):
            pass
        with open_review(work, stage="masks") as review:
            assert review.counts()["accepted"] == 1

    def test_masks_of_a_stage(self, work):
        with open_review(work, stage="plain") as review:
            state = review.state()
            assert state["score"] == 0.5 and state["crf"] is False

    def test_wrong_names(self, work, tmp_path):
        with pytest.raises(UserError, match="no run"), open_review(tmp_path):
            pass
        with pytest.raises(UserError, match="--stage nothing"), open_review(work, stage="nothing"):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork a server of its own takes too long to start")
class TestKill:
    def test_what_was_answered_is_there_after_a_kill(self, work):
        """kill -9 in the middle of decisions: all that were answered are in the file, and their masks are whole."""
        child, server = self.start(work)
        client = Client(server)
        image = client.state()["images"][0]
        answered, stop = [], threading.Event()

        def decide_on():
            for step in range(10_000):
                scores = dict.fromkeys(image["tags"], 0.1 + step % 80 / 100)
                try:
                    if stop.is_set() or client.decide(0, "accepted", scores) != 200:
                        return
                except (OSError, http.client.HTTPException):
                    return
                answered.append(scores)

        thread = threading.Thread(target=decide_on)
        thread.start()
        end = time.monotonic() + 30
        while len(answered) < 15 and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stop.set()
        thread.join()
        assert len(answered) >= 15
        stored = [line["scores"] for line in lines(work)]
        assert stored[: len(answered)] == answered and len(stored) <= len(answered) + 1
        reviewed_mask(work, image["name"]).unlink()  # as if the kill had come between line and mask

        with open_review(work) as review:  # the lock died with its process
            assert review.state()["images"][0]["scores"] == stored[-1]
            maps = read_maps(map_path(next(work.glob("cams-*")), image["name"]))
            mask = np.asarray(Image.open(reviewed_mask(work, image["name"])))
            assert (mask == by_class(maps, stored[-1], review.classes)).all()

    def start(self, work):
        """(process id, where its server listens) of a server in a process of its own."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with open_review(work) as review, ReviewServer(review) as server:
                    os.write(writing, f"{server.server_port} {server.token}".encode())
                    server.serve_forever()
            finally:
                os._exit(1)
        os.close(writing)
        port, token = os.read(reading, 1000).decode().split()
        os.close(reading)
        return child, SimpleNamespace(server_port=int(port), token=token)
