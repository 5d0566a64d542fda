"""Serves a web page that shows, for an image, the prediction and attention of each expert and the class frequency.

deitlt demo --model outputs/digits_lt_fast/student
deitlt demo --model DIR_OR_HUB_ID --examples DIR_OF_IMAGES --port 8000
"""

import socket
from collections.abc import Sequence

from .parser import command_parser

MAX_UPLOAD = "20mb"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, help="Folder or Hub id of a saved student.")
    parser.add_argument("--examples", help="Folder of example images; by default the model folder's examples, if any.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to serve on; 0.0.0.0 for every network.")
    parser.add_argument("--port", type=int, help="Port to serve on; by default the first free port from 7860.")
    args = parser.parse_args(arguments)
    _check_address(args.host, args.port)
    from ..console import quiet_log
    from ..serving.web_demo import build_demo

    quiet_log()
    demo = build_demo(args.model, args.examples)
    _, url, _ = demo.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The demo is at {url} until Ctrl+C.", flush=True)
    demo.block_thread()


def _check_address(host: str, port: int | None) -> None:
    """Checks, before the model is loaded, that the address and port are free; Gradio would try a hundred ports.

    Raises:
        ValueError: If the address does not belong to this machine, or the port is taken.
    """
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        place = host if port is None else f"{host}:{port}"
        raise ValueError(
            f"cannot serve on {place}: the port is taken or not permitted, or the address does not belong to this "
            "machine; give another --host or --port."
        ) from error
