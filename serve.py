#!/usr/bin/env python3
"""识别服务: REST 接口和一个网页,供别的系统和手机使用。

先安装: pip install fastapi uvicorn python-multipart prometheus-client

用法: python serve.py [选项]

  --host ADDRESS          监听的地址 [127.0.0.1: 只有本机能用]
  --port N                监听的端口,0 为任选一个 [8000]
  --token TEXT            口令,请求要带上它 [环境变量 WWTS_TOKEN]
  --no-token              监听本机以外的地址而不要口令
  --max-bytes N           一张图片最多几字节 [20000000]
  --queue N               最多几张图片排队,再多就答 503 [128]
  --cache [FILE]          缓存结果,同一图片不再重算;可以是 redis://…
                          [用户缓存文件夹]
  -m, --repo, --trust-repo, --weights, --labels, --offline, -d, --dtype,
  --engine, -b, -j, --draft
                          与 infer.py 相同: 用哪个模型,怎样运行它
  -q, --quiet             不显示 [INFO] 信息
  --log-time              每行信息前写上时间
  -h, --help              显示本说明

示例:
  python serve.py -m wwts_cn_lite           浏览器打开 http://127.0.0.1:8000
  curl -F image=@cat.jpg http://127.0.0.1:8000/recognize
  WWTS_TOKEN=口令 python serve.py --host 0.0.0.0

退出状态: 2 用法错误  3 模型或端口不可用
          130/143 被 Ctrl-C 或 SIGTERM 结束,收到的请求都已回答
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
import sys

import infer

PACKAGES = {name: name.replace("_", "-") for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client")}
KEEP_SECONDS = 75  # an idle connection; longer than proxies keep theirs, so that none is closed while it is used
STOP_SECONDS = 8  # for requests under way, after SIGTERM

log = logging.getLogger("wwts")


def is_local(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ModelError where that cannot be."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Connections inherit it. Without it an answer's body waits 40 ms for the acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise infer.ModelError(f"不能监听 {host} 的端口 {port}: {infer.one_line(error)}。请换一个 --port") from error


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes; return the exit status."""
    if missing := [package for name, package in PACKAGES.items() if not importlib.util.find_spec(name)]:
        raise infer.ModelError(f"缺少 {'、'.join(missing)},请运行: pip install {' '.join(missing)}")
    if not 0 <= arguments.port <= 65535 or arguments.max_bytes < 1 or arguments.queue < 1:
        raise infer.UsageError("--port 应在 0 到 65535 之间,--max-bytes 和 --queue 应为不小于 1 的整数")
    if not arguments.token and not arguments.no_token and not is_local(arguments.host):
        raise infer.UsageError(
            f"监听 {arguments.host} 时别的机器也能用,请用 --token 设口令;确实不要口令,请写 --no-token"
        )
    import uvicorn

    from serving.app import build_app
    from serving.uploads import Protocol

    # Whoever connects while the model is loaded waits for it.
    with listen(arguments.host, arguments.port) as listener:
        app = build_app(arguments)
        # What is to be said is said by the application; the rest would be tracebacks.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
            server_header=False, timeout_keep_alive=KEEP_SECONDS, timeout_graceful_shutdown=STOP_SECONDS,
        )  # fmt: skip
        host, port = listener.getsockname()[:2]
        log.info("已开始服务: http://%s:%d", f"[{host}]" if ":" in host else host, port)
        uvicorn.Server(config).run([listener])
    return 0


def build_parser() -> infer.Parser:
    """The command line; for those too who put the application on another server (docs/服务.md)."""
    parser = infer.Parser("serve.py", __doc__)
    infer.add_model_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--token", default=os.environ.get("WWTS_TOKEN"))
    add("--no-token", action="store_true")
    add("--max-bytes", type=int, default=20_000_000)
    add("--queue", type=int, default=128)
    add("--cache", nargs="?", const=str(infer.cache_folder() / "results.sqlite"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return infer.run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
