#!/usr/bin/env python3
"""How good learn.py's head is with few photos, against other heads on the same features of wwts_cn_lite.

    pip install scikit-learn
    python tests/benchmark_learn.py 商品 别家店

Both folders have a subfolder for each category. For 1, 3, 5, 10 and 20 photos a category (drawn ten times, all of
them once) it prints the accuracy on the second folder; then the calibration error before and after.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from infer import Parser, add_model_options, cache_folder

import learn
from wwts.memory import Cache

ROWS = "学习得到的头", "同上,不看第二眼", "逻辑回归", "最近的类中心", "最近的一张照片"


def main():
    parser = Parser("benchmark_learn.py", __doc__)
    add_model_options(parser, leave_out=("labels",))
    arguments = parser.parse_args(["-m", "wwts_cn_lite"])
    arguments.source = (None, False, None, None, False)
    parts = [learn.collect([folder])[0] for folder in sys.argv[1:3]]
    names = sorted(set(parts[0].values()))
    network, store = learn.open_backbone(arguments, 1000), Cache(str(cache_folder() / "features.sqlite"))
    shares = (learn.SECOND_LOOKS, 0)
    train, test = (
        learn.gather(labels, learn.look_at(list(labels), network, arguments, store, share))
        for labels, share in zip(parts, shares, strict=True)
    )
    for number in (1, 3, 5, 10, 20):
        results = []
        for seed in range(1 if number == 20 else 10):
            random = np.random.default_rng(seed)
            order = random.permutation(len(train.labels))
            rows = np.concatenate([order[train.labels[order] == label][:number] for label in range(len(names))])
            results.append([(answers == test.labels).mean() for answers in all_heads(train, test, rows)])
        means = " ".join(f"{name} {value:.1%}" for name, value in zip(ROWS, np.mean(results, 0), strict=True))
        print(f"每类 {number} 张: {means}")
    temperature, _, answers = learn.cross_validate(train)
    weight, bias = learn.fit_head(train, np.arange(len(train.labels)))
    print(f"交叉验证正确率 {(answers[:, 0] == train.labels).mean():.1%},温度 {temperature:.1f}")
    for title, divisor in (("校准前", 1.0), ("校准后", temperature)):
        answers = learn.answer(test.features, (weight / divisor, bias / divisor), test.labels)
        facts = learn.judge(test.labels, answers, names)
        print(f"{title}: 正确率 {facts['accuracy']:.1%},校准误差 {facts['calibration_error']:.3f}")


def all_heads(train, test, rows):
    """The answers of each head, learned from some rows, to the test photos."""
    labels, none = train.labels[rows], train._replace(again=train.again[:0], changes=train.changes[:0])
    for photos in (train, none):
        weight, bias = learn.fit_head(photos, rows)
        yield (test.features @ weight.T + bias).argmax(1)
    plain, others = (normalize(photos.features**2) for photos in (train, test))
    for head in (LogisticRegression(C=100, max_iter=1000), NearestCentroid(), KNeighborsClassifier(1)):
        yield head.fit(plain[rows], labels).predict(others)


if __name__ == "__main__":
    main()
