"""Serve a moving test pattern by RTSP with GStreamer's server, until it is ended.

    python3 rtsp_server.py [PORT USER PASSWORD]

Prints "ready". Without a port it shows by its exit code, 0 or 1, whether it could. Run by the
Python of the system, which GStreamer's packages belong to (Debian and Ubuntu: python3-gi,
gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good).
"""

import sys

import gi  # pyright: ignore[reportMissingImports]

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # pyright: ignore[reportMissingImports]

PIPELINE = (
    "( videotestsrc is-live=true pattern=ball "
    "! video/x-raw,format=I420,width=160,height=120,framerate=10/1 "
    "! jpegenc ! rtpjpegpay name=pay0 pt=26 )"
)


def main(port: str, user: str, password: str) -> None:
    server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
    server.set_service(port)
    factory.set_launch(PIPELINE)
    factory.set_shared(True)
    allow_one_user(server, factory, user, password)
    server.get_mount_points().add_factory("/live", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


def allow_one_user(
    server: "GstRtspServer.RTSPServer",
    factory: "GstRtspServer.RTSPMediaFactory",
    user: str,
    password: str,
) -> None:
    """Let nobody watch but one user.

    Args:
        server: to be guarded.
        factory: of what it serves.
        user: who may watch.
        password: of the user.
    """
    auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
    token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "viewer")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    allowed = Gst.Structure.new_empty("viewer")
    for right in ("ACCESS", "CONSTRUCT"):
        name = getattr(GstRtspServer, f"RTSP_PERM_MEDIA_FACTORY_{right}")
        allowed.set_value(name, True)
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_role_from_structure(allowed)
    factory.set_permissions(permissions)


if __name__ == "__main__":
    Gst.init(None)
    if len(sys.argv) == 1:
        sys.exit(not all(map(Gst.ElementFactory.find, ("videotestsrc", "jpegenc", "rtpjpegpay"))))
    main(*sys.argv[1:])
