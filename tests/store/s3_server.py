"""A local S3 server of moto's in a process of its own: `python tests/store/s3_server.py` prints its port and serves.

It answers one request after the other: moto checks a condition and writes in two steps, which S3 does in one. Of a
bucket named careless-... it forgets the conditions, as a server does that does not know them.
"""

import logging

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


def main() -> None:
    """Serve until killed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        if environ["PATH_INFO"].startswith("/careless-"):
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=False)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
