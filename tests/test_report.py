"""report.py and its page, in a real browser: looking, filtering, correcting, downloading; strangers' texts."""

import base64
import csv
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from browser import download
from conftest import ROOT, SAMPLES
from PIL import Image

import report

HOSTILE = ['"><img src=x onerror=document.title=1>.jpg', "</script><script>document.title=1</script>", "a\u202egpj.b"]


def record(path, *results, error=None, model="m", version="1a2b3c4d"):
    """A record of infer.py's JSONL; results are (label, confidence)."""
    answers = [{"label": label, "confidence": number, "index": 0} for label, number in results]
    return {"path": str(path), "model": model, "version": version} | (
        {"error": error} if error else {"results": answers}
    )


def write_results(path, records):
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return path


@pytest.fixture
def make_report(capsys, monkeypatch, tmp_path):
    """report.py's main in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = report.main([str(argument) for argument in arguments])
        return SimpleNamespace(returncode=status, stderr=capsys.readouterr().err)

    return run


@pytest.fixture
def photos(tmp_path):
    """Four photos with short names, as records of one model: two cats, a coffee, a failure."""
    for source, name in zip(SAMPLES, ("猫1.jpg", "猫2.jpg", "咖啡.jpg"), strict=False):
        shutil.copy(source, tmp_path / name)
    (tmp_path / "坏.jpg").write_bytes(b"no photo")
    records = [
        record("猫1.jpg", ("埃及猫", 0.91), ("虎斑猫", 0.05), ("浓缩咖啡", 0.01)),
        record("猫2.jpg", ("埃及猫", 0.42), ("虎斑猫", 0.4)),
        record("咖啡.jpg", ("浓缩咖啡", 1.0)),
        record("坏.jpg", error="无法识别的图像格式,或文件已损坏"),
    ]
    return write_results(tmp_path / "结果.jsonl", records)


@pytest.fixture
def page(browser):
    """Open a page afresh, without what was judged before; it must not break its own Content-Security-Policy."""

    def open_page(path):
        browser.get(path.absolute().as_uri())
        browser.execute_script("localStorage.clear()")
        browser.refresh()
        browser.get_log("browser")
        return Page(browser)

    yield open_page
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints


class Page:
    """What a user sees of the page and does to it."""

    def __init__(self, browser):
        self.browser = browser

    def drawn(self, expression="null"):
        """The value of an expression after the page has drawn what it was going to draw."""
        return self.browser.execute_async_script(f"""
            const done = arguments[0];
            requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => done({expression}))));
        """)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def all(self, selector):
        self.drawn()  # or what is found may be replaced before it is looked at
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector):
        """The texts that are shown, read in one step."""
        texts = self.drawn(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)")
        return [text.strip() for text in texts]

    def text(self, selector):
        return self.texts(selector)[0]

    def labels(self):
        """The labels of the photos in view, in their order on the page."""
        return self.drawn("""
            [...document.querySelectorAll("#photos li")]
                .sort((a, b) => a.getAttribute("aria-posinset") - b.getAttribute("aria-posinset"))
                .map(card => card.querySelector(".first").innerText.trim())
        """)

    def press(self, *keys):
        """Press keys one after the other, wherever the keyboard is."""
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            self.browser.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def card(self, number, selector):
        return self.find(f"#photos li[aria-posinset='{number}'] {selector}")

    def download(self):
        """The rows of the CSV file that a click on the button saves."""
        data = download(self.browser, "改正.csv").read_bytes()
        assert data.startswith(b"\xef\xbb\xbfpath,label\r\n")
        return [tuple(row) for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))][1:]


# ---------------------------------------------------------------- the page in a browser


def test_real_results_of_both_formats(infer, make_report, page, tmp_path):
    """From infer.py's own files; either format makes the same page, down to the key of what was corrected."""
    for path in SAMPLES:
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(SAMPLES[0], tmp_path / "=1+1.jpg")
    (tmp_path / "a\\n,\n\u202e.jpg").write_bytes(b"no photo")
    pages = []
    for form in ("csv", "jsonl"):
        # From the cache the second time, since a batch of another size may change the last decimal.
        result = infer("*.jpg", "-m", "wwts_cn_lite", "-k", "3", "-o", f"结果.{form}", "--cache", "c.db", cwd=tmp_path)
        assert result.returncode == 1, result.stderr
        assert make_report(f"结果.{form}", "-o", f"{form}.html").returncode == 0
        text = (tmp_path / f"{form}.html").read_text(encoding="utf-8")
        pages.append(re.findall(r'class="(?:photos|thumbnails)">(.*)</script>', text))
        pages[-1].append(re.search(r'"digest":"\w{64}"', text)[0])
    assert pages[0] == pages[1]
    shown = page(tmp_path / "csv.html")
    assert "结果.csv" in shown.text("#source") and "wwts_cn_lite" in shown.text("#source")
    assert [fact.text.split("\n") for fact in shown.all("#facts > *")] == [["照片", "6"], ["出错", "1"], ["类别", "4"]]
    assert sorted(shown.labels()) == sorted(["出错", "埃及猫", "埃及猫", "浓缩咖啡", "宫殿", "三脚架"])
    assert len(shown.all("#photos img")) == 5


def test_filters_and_charts(make_report, page, photos):
    make_report(photos)
    shown = page(photos.with_suffix(".html"))
    assert shown.labels() == ["埃及猫", "埃及猫", "浓缩咖啡", "出错"]
    assert "无法识别的图像格式" in shown.text("#photos")
    shown.find("#path").send_keys("猫")
    assert shown.labels() == ["埃及猫", "埃及猫"] and shown.text("#count") == "2 / 4 张照片"
    shown.find("#from").send_keys("0.5")
    assert shown.labels() == ["埃及猫"]
    shown.find("button[type=reset]").click()
    assert len(shown.labels()) == 4
    shown.find("#label").send_keys("咖")  # a part of a label
    assert shown.labels() == ["浓缩咖啡"]
    shown.find("button[type=reset]").click()
    shown.find("#facts button").click()
    assert shown.labels() == ["出错"]
    shown.find("button[type=reset]").click()

    bars = {bar.get_attribute("aria-label"): bar for bar in shown.all("#labels-chart [role=button]")}
    assert list(bars) == ["埃及猫:2 张", "浓缩咖啡:1 张"]
    bars["埃及猫:2 张"].click()
    assert shown.labels() == ["埃及猫", "埃及猫"]
    shown.press("ENTER")  # the keyboard is at the same bar, which takes its filter back
    assert len(shown.labels()) == 4
    bars = {bar.get_attribute("aria-label"): bar for bar in shown.all("#confidence-chart [role=button]")}
    assert sum(int(name.split(":")[1].removesuffix(" 张")) for name in bars) == 3
    bars["置信度 0.95 到 1.00:1 张"].click()
    assert shown.labels() == ["浓缩咖啡"]
    shown.find("button[type=reset]").click()
    order = shown.find("#order")
    order.send_keys("置信度从低")
    assert shown.texts("#photos .about p:nth-child(2)")[:3] == [
        "置信度 0.42",
        "置信度 0.91",
        "置信度 1.00",
    ]


def test_correct_by_mouse_reload_undo_download(make_report, page, photos):
    make_report(photos)
    shown = page(photos.with_suffix(".html"))
    assert not shown.find("#download").is_enabled() and not shown.find("#undo").is_enabled()
    shown.card(1, ".accept").click()
    shown.card(2, ".edit").click()
    assert "浓缩咖啡" in shown.text("#choices")
    shown.find("#wanted").send_keys("斑")
    (choice, new) = shown.all("#choices li")
    assert (choice.text, new.text) == ("虎斑猫", "新标签:斑")
    choice.click()
    shown.card(3, ".photo").click()  # large: the original, all labels
    assert shown.find("#answers").text.split("\n") == ["浓缩咖啡", "1.000"]
    shown.find("#details [data-name=edit]").click()
    shown.find("#wanted").send_keys('拿铁, "大"')
    shown.find("#choices li").click()
    assert "已判断 3 张,改正 2 张,准确率 33.3%" in shown.text("#accuracy")
    assert "6.1% – 79.2%" in shown.text("#accuracy")  # Wilson's interval of 1 in 3, by statsmodels' proportion_confint
    expected = [("猫1.jpg", "埃及猫"), ("猫2.jpg", "虎斑猫"), ("咖啡.jpg", '拿铁, "大"')]

    shown.browser.refresh()
    assert "已判断 3 张,改正 2 张" in shown.text("#accuracy")
    assert shown.download() == expected
    shown.find("#undo").click()
    assert shown.download() == expected[:2]
    shown.card(1, ".accept").click()  # takes the judgement back
    assert shown.download() == expected[1:2]

    make_report(photos, "-o", "again.html", "--forbid", "埃及猫")  # the same results: what was judged is still there
    shown.browser.get((photos.parent / "again.html").as_uri())
    assert "已判断 1 张,改正 1 张" in shown.text("#accuracy")
    photos.write_text(photos.read_text(encoding="utf-8").replace("0.91", "0.92"), encoding="utf-8")
    make_report(photos, "-o", "other.html")
    shown.browser.get((photos.parent / "other.html").as_uri())
    assert "还没有判断" in shown.text("#accuracy")


def test_correct_by_keyboard_only(make_report, page, photos, tmp_path):
    (tmp_path / "标签.txt").write_text("脐橙\n赣南脐橙\n", encoding="utf-8")
    make_report(photos, "--labels", "标签.txt")
    shown = page(photos.with_suffix(".html"))
    shown.press("y")  # nothing is judged before the keyboard is at a photo
    assert "还没有判断" in shown.text("#accuracy")
    shown.press("2")  # the first photo's second label; on to the next
    shown.press("e")
    shown.find("#wanted").send_keys("南脐")
    shown.press("ENTER")
    shown.press("ENTER")  # the third one large
    assert shown.find("#viewer").is_displayed() and "第 3 张" in shown.text("#details")
    shown.press("y", "ESCAPE")
    assert not shown.find("#viewer").is_displayed()
    assert "准确率 33.3%" in shown.text("#accuracy")
    assert shown.download() == [("猫1.jpg", "虎斑猫"), ("猫2.jpg", "赣南脐橙"), ("咖啡.jpg", "浓缩咖啡")]
    shown.press("ESCAPE")
    shown.browser.execute_script("document.activeElement.blur()")
    shown.press("u", "y", "HOME", "ARROW_RIGHT", "DELETE")
    assert shown.download() == [("猫1.jpg", "虎斑猫")]
    shown.press("/")
    assert shown.browser.switch_to.active_element.get_attribute("id") == "path"


def test_strangers_texts_are_only_texts(make_report, page, tmp_path):
    """Hostile names of files, labels, models and errors run nothing, hide nothing, and come out of the CSV whole."""
    names = [*HOSTILE, "=1+1.jpg", "a\nb #?%.jpg", "'c,d\".jpg", "folder:name/e.jpg", "f\\n.jpg"]
    names = [name.replace("/script>", "∕script>") for name in names]
    (tmp_path / "folder:name").mkdir()
    for name in names:
        shutil.copy(SAMPLES[0], tmp_path / name)
    records = [
        record(name, (label, 0.5), model=HOSTILE[1]) for name, label in zip(names, HOSTILE + HOSTILE * 2, strict=False)
    ]
    records += [record(HOSTILE[1], error=text, model=HOSTILE[1]) for text in HOSTILE]
    write_results(tmp_path / "结果.jsonl", records)
    (tmp_path / "标签.json").write_text(json.dumps([*HOSTILE, "=cmd()", "'quoted"]))
    assert make_report("结果.jsonl", "--labels", "标签.json", "--forbid", HOSTILE[1]).returncode == 1
    shown = page(tmp_path / "结果.html")
    assert shown.browser.title == "识别报告"
    assert shown.labels()[:3] == [HOSTILE[0], HOSTILE[1], r"a\u202egpj.b"]
    for label in ("=cmd()", "'quoted", *names[2:]):
        shown.browser.execute_script(
            "focusPhoto(arguments[0])", names.index(label) if label in names else label == "'quoted"
        )
        if label in names:
            shown.press("y")
        else:
            shown.press("e")
            shown.find("#wanted").send_keys(label)
            shown.press("ENTER")
    expected = {name: label for name, label in zip(names, HOSTILE + HOSTILE * 2, strict=False)}
    expected |= {names[0]: "=cmd()", names[1]: "'quoted"}
    rows = shown.download()
    assert not any(cell.startswith(tuple("=+-@")) for row in rows for cell in row)
    found = {os.path.abspath(path): re.sub("^'(?=[-=+@'])", "", label) for path, label in rows}
    assert found == {os.path.abspath(name): label for name, label in expected.items()}
    for index in range(len(names)):  # all originals are found by their links
        shown.browser.execute_script("openViewer(arguments[0])", index)
        assert (
            shown.browser.execute_async_script(
                "const done = arguments[0], image = new Image(); image.onload = () => done(image.naturalWidth);"
                "image.onerror = () => done(view[current].link); image.src = view[current].link"
            )
            == Image.open(SAMPLES[0]).width
        )
    assert shown.browser.title == "识别报告" and len(shown.all("script:not([type])")) == 1
    assert not shown.all("img[src=x]")


def test_ten_thousand_photos(make_report, page, tmp_path):
    """Only those in view are in the document, and all of them can be reached."""
    for number in range(10):
        Image.new("RGB", (32, 24), (number * 20, 90, 90)).save(tmp_path / f"{number}.jpg")
    many = [record(f"{number % 10}.jpg", (f"标签{number // 10}", number / 10000)) for number in range(10000)]
    write_results(tmp_path / "结果.jsonl", many)
    assert make_report("结果.jsonl").returncode == 0
    shown = page(tmp_path / "结果.html")
    assert shown.text("#count") == "10,000 张照片" and shown.labels()[0] == "标签0"
    shown.browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    shown.browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    assert shown.labels()[-1] == "标签999" and len(shown.all("#photos li")) < 100
    shown.browser.execute_script("focusPhoto(0)")
    for key, position in (("END", 10000), ("ARROW_LEFT", 9999), ("HOME", 1), ("ARROW_RIGHT", 2)):
        shown.press(key)
        focused = shown.browser.switch_to.active_element.find_element("xpath", "..")
        assert focused.get_attribute("aria-posinset") == str(position)
    assert shown.browser.execute_script("return document.activeElement.querySelector('img').naturalWidth") == 32


def test_page_in_another_folder_and_lost_originals(make_report, page, tmp_path):
    (tmp_path / "照片").mkdir()
    (tmp_path / "网页" / "深").mkdir(parents=True)
    for source in SAMPLES[:2]:
        shutil.copy(source, tmp_path / "照片" / source.name)
    names = [f"照片/{source.name}" for source in SAMPLES[:2]]
    write_results(tmp_path / "结果.jsonl", [record(name, ("猫", 0.5)) for name in [*names, "照片/没了.jpg"]])
    result = make_report("结果.jsonl", "-o", "网页/深/报告.html")
    assert result.returncode == 0 and "1 张照片打不开" in result.stderr
    (tmp_path / names[1]).unlink()
    shown = page(tmp_path / "网页" / "深" / "报告.html")
    assert "没有图:文件不存在" in shown.text("#photos")
    loaded = "const image = document.querySelector('#picture img'); return image.complete ? image.naturalWidth : 0"
    for number, width in (
        (1, Image.open(SAMPLES[0]).width),
        (2, 160),
    ):  # the thumbnail stays where the original is gone
        shown.card(number, ".photo").click()
        wait_for(lambda width=width: shown.browser.execute_script(loaded) == width)
        wait_for(lambda number=number: ("原图打不开" in shown.text("#picture")) == (number == 2))
        shown.press("ESCAPE")
    shown.browser.get_log("browser")  # that it was not found


def wait_for(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("never came about")


CONTRASTS = """
const luminance = (color) => {
  const [red, green, blue] = color.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const background = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" ? background(element.parentElement) : color;
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].map((node) => node.nodeType === Node.TEXT_NODE ? node.data.trim() : "").join("");
  if (!text || !element.checkVisibility() || element.closest("script, :disabled, title")) continue;
  const style = getComputedStyle(element), svg = element instanceof SVGElement;
  const pair = [svg ? style.fill : style.color, background(svg ? element.ownerSVGElement : element)].map(luminance);
  const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (contrast < 4.5) poor.push([text, contrast]);
}
return poor;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_looks(make_report, page, photos, theme, width):
    """WCAG's AA contrast of all texts; nothing wider than the window; every picture has a text."""
    make_report(photos, "--forbid", "虎斑猫")
    shown = page(photos.with_suffix(".html"))
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": theme}
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        shown.browser.execute_script("judge(view[0], '虎斑猫'); judge(view[2], view[2].label); openViewer(1)")
        assert shown.browser.execute_script(CONTRASTS) == []
        shown.browser.execute_script("openChooser(1, true)")
        assert shown.browser.execute_script(CONTRASTS) == []
        assert shown.browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert all(image.get_attribute("alt") is not None for image in shown.all("img"))
        assert shown.browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    finally:
        shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_other_host(make_report, photos):
    make_report(photos)
    text = photos.with_suffix(".html").read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[\w./-]+", text)) == {"http://www.w3.org/2000/svg"}


# ---------------------------------------------------------------- the command


def test_rules(make_report, page, photos, tmp_path):
    """Photos that break them are counted, come first where there is no room for all, and make the status 1."""
    (tmp_path / "禁.txt").write_text("虎斑猫\n狗\n", encoding="utf-8")
    result = make_report(photos, "--forbid", "禁.txt", "-t", "0.2")
    assert result.returncode == 1 and "1 张照片违反" in result.stderr
    assert make_report(photos, "--forbid", "狗", "--forbid", "猫").returncode == 0
    assert make_report(photos, "--require", "埃及猫", "--require", "浓缩咖啡").returncode == 1  # the failed one
    result = make_report(photos, "--require", "埃及猫", "--most", "2")
    assert result.returncode == 1 and "网页里省略了 2 张" in result.stderr
    shown = page(photos.with_suffix(".html"))
    assert shown.labels() == ["浓缩咖啡", "出错"] and "省略了 2 张" in shown.text("#note")
    assert "违规:没有埃及猫" in shown.text("#photos")
    assert make_report(photos, "--most", "3", "--require", "埃及猫").returncode == 1
    shown = page(photos.with_suffix(".html"))
    assert shown.labels() == ["埃及猫", "浓缩咖啡", "出错"]
    shown.find("#status").send_keys("违规")
    assert shown.labels() == ["浓缩咖啡", "出错"]
    result = make_report(photos, "--labels", "禁.txt", "--forbid", "虎班猫")
    assert result.returncode == 2 and "没有这些标签: 虎班猫" in result.stderr


GOOD = record("a.jpg", ("猫", 0.5))
HEADER = "\ufeffpath,model,version,label_1,confidence_1,error\r\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("torn.jsonl", json.dumps(GOOD) + '\n{"path": "b.j', "第 2 行不完整"),
        ("torn.csv", HEADER + "a.jpg,m,1a2b3c4d,猫,0.5,\r\nb.jpg,m", "第 3 行不完整"),
        ("empty.jsonl", "", "没有记录"),
        ("header.csv", HEADER, "没有记录"),
        ("foreign.jsonl", '{"name": "x"}\n', "第 1 行不是"),
        ("list.jsonl", "[1]\n", "第 1 行不是"),
        ("deep.jsonl", "[" * 100000 + "\n", "第 1 行不是"),
        ("nan.jsonl", json.dumps(record("a.jpg", ("猫", float("nan")))) + "\n", "第 1 行不是"),
        ("type.jsonl", json.dumps(GOOD | {"path": 1}) + "\n", "第 1 行不是"),
        ("old.jsonl", json.dumps({key: GOOD[key] for key in ("path", "model", "results")}) + "\n", "第 1 行不是"),
        ("foreign.csv", "name,price\r\nx,1\r\n", "第 2 行不是"),
        ("columns.csv", HEADER + "a.jpg,m,1a2b3c4d,猫\r\n", "第 2 行不是"),
        ("number.csv", HEADER + "a.jpg,m,1a2b3c4d,猫,很高,\r\n", "第 2 行不是"),
        (
            "mixed.jsonl",
            "".join(json.dumps(GOOD | {"version": v}) + "\n" for v in ("11111111", "22222222")),
            "不同的模型",
        ),
        ("photo.jpg", "\x89PNG\n", "第 1 行不是"),
    ],
)
def test_files_that_are_no_results(make_report, tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "报告.html").write_text("earlier")
    result = make_report(name, "-o", "报告.html")
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "报告.html").read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


def test_wrong_usage(make_report, photos, tmp_path):
    (tmp_path / "d.html").mkdir()
    for arguments, words in (
        ([], "缺少参数: 结果文件"),
        (["没有.csv"], "没有.csv 无法读取"),
        ([tmp_path], "无法读取"),
        ([photos, "-o", "报告.csv"], ".html"),
        ([photos, "-o", "d.html"], "d.html"),
        ([photos, "-o", "没有/报告.html"], "没有"),
        ([photos, "--most", "0"], "--most"),
        ([photos, "-t", "2"], "-t"),
    ):
        result = make_report(*arguments)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert make_report(photos, "--labels", "没有.txt").returncode == 3


def test_several_files(make_report, photos, tmp_path):
    """The shares of torchrun are one report; a share of another version is refused by name."""
    lines = photos.read_text(encoding="utf-8").splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"out.rank{rank}.jsonl").write_text("".join(lines[rank::2]), encoding="utf-8")
    result = make_report("out.rank0.jsonl", "out.rank1.jsonl", "-o", "报告.html")
    assert result.returncode == 0 and "4 张照片" in result.stderr
    write_results(tmp_path / "out.rank2.jsonl", [record("a.jpg", version="ffffffff", error="x")])
    result = make_report("out.rank0.jsonl", "out.rank2.jsonl")
    assert result.returncode == 2 and "1a2b3c4d" in result.stderr and "ffffffff" in result.stderr


def test_thumbnails(tmp_path):
    """At most 160 pixels, upright, and what the whole photo gives when it is made smaller."""
    for source in SAMPLES:
        image = Image.open(source).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by a quarter to see it upright
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
        small = Image.open(io.BytesIO(base64.b64decode(report.make_thumbnail(str(tmp_path / "turned.jpg"))))).convert(
            "RGB"
        )
        assert max(small.size) == 160
        expected = image.resize(small.size, Image.Resampling.LANCZOS, reducing_gap=None)
        assert abs(image.width / image.height - small.width / small.height) < 0.02
        assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 10


def test_memory_does_not_grow(tmp_path):
    """A page ten times as large takes no more memory."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    peaks, sizes = [], []
    program = f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import report; report.main(sys.argv[1:]);"
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    scale = 2**20 if sys.platform == "darwin" else 2**10
    for count in (200, 2000):
        write_results(tmp_path / "结果.jsonl", [record("noise.jpg", ("猫", 0.5))] * count)
        command = [sys.executable, "-c", program, "-q", "结果.jsonl"]
        peaks.append(int(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout) / scale)
        sizes.append((tmp_path / "结果.html").stat().st_size / 2**20)
    assert sizes[1] - sizes[0] > 20
    assert peaks[1] - peaks[0] < 8


def test_as_a_process(photos):
    """A full disk and a template that is missing are one line, status 3; help needs neither."""
    command = [sys.executable, ROOT / "report.py"]
    result = subprocess.run([*command, "--help"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0 and "用法: python report.py" in result.stdout and not result.stderr
    result = subprocess.run([*command, photos], cwd=photos.parent, capture_output=True, encoding="utf-8")
    assert result.returncode == 0 and "4 张照片" in result.stderr
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    result = subprocess.run(
        [*command, photos, "-o", "满.html"], cwd=photos.parent, capture_output=True, encoding="utf-8", **limit
    )
    assert result.returncode == 3 and result.stderr.count("\n") == 1 and "满.html" in result.stderr
    assert not (photos.parent / "满.html").exists() and not list(photos.parent.glob(".*"))
    for name in ("infer.py", "report.py"):
        shutil.copy(ROOT / name, photos.parent)
    shutil.copytree(ROOT / "wwts", photos.parent / "wwts")
    result = subprocess.run(
        [sys.executable, "report.py", photos], cwd=photos.parent, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 3 and "重新下载" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.skipif(not (ROOT / "learn.py").is_file(), reason="needs learn.py")
def test_recognise_look_correct_learn(infer, home, page, make_report, tmp_path):
    """What is corrected on the page is learned: the same photos get the new label."""
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    for source, folder in zip(SAMPLES, ("商品/猫", "商品/咖啡", "新照片"), strict=False):
        (tmp_path / folder).mkdir(parents=True)
        with Image.open(source) as image:
            for number in range(5):
                left, top = rng.integers(0, [image.width // 5, image.height // 5])
                box = (left, top, left + image.width * 4 // 5, top + image.height * 4 // 5)
                image.crop(box).save(tmp_path / folder / f"{number}.jpg")

    def learn(*inputs):
        command = [
            sys.executable,
            ROOT / "learn.py",
            *inputs,
            "-m",
            "wwts_cn_lite",
            "-d",
            "cpu",
            "-o",
            "商品.safetensors",
        ]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"HOME": str(home)}, check=True, capture_output=True)
        result = infer("-m", "商品.safetensors", "新照片", "-o", "结果.csv", "--overwrite", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert make_report("结果.csv").returncode == 0
        return page(tmp_path / "结果.html")

    shown = learn("商品")
    assert set(shown.labels()) <= {"猫", "咖啡"}
    shown.browser.execute_script("focusPhoto(0)")
    for _ in range(5):
        shown.press("e")
        shown.find("#wanted").send_keys("宫殿")
        shown.press("ENTER")
    assert len(shown.download()) == 5
    shutil.copy(shown.browser.downloads / "改正.csv", tmp_path)
    assert learn("商品", "改正.csv").labels() == ["宫殿"] * 5
