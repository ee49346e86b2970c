"""What obstore alone does with one file, in a process that gives way as the drain does; prints the seconds.

python -m bench.object_store.client put URL KEY FILE --endpoint http://127.0.0.1:9000
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import obstore
from obstore.store import from_url

from bench.measure.sampling import clock
from ckpt.storage.object_store import parts_for

LOWEST_PRIORITY = 19


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["put", "get"])
    parser.add_argument("url")
    parser.add_argument("key")
    parser.add_argument("file", type=Path)
    parser.add_argument("--endpoint", required=True)
    args = parser.parse_args()
    config = {"endpoint": args.endpoint, "region": "us-east-1", "skip_signature": "true"}
    store = from_url(args.url, config=config, client_options={"allow_http": "true", "timeout": "300s"})
    if args.what == "put":
        os.nice(LOWEST_PRIORITY)
        part, in_flight = parts_for(args.file.stat().st_size)
        began = clock()
        obstore.put(store, args.key, args.file, chunk_size=part, max_concurrency=in_flight)
    else:
        began = clock()
        with args.file.open("wb") as file:
            for chunk in obstore.get(store, args.key).stream(min_chunk_size=8 << 20):
                file.write(chunk)
    print(clock() - began)


if __name__ == "__main__":
    main()
