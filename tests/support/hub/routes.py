"""Which endpoint answers which address of the Hub."""

from urllib.parse import unquote

from starlette.convertors import Convertor, register_url_convertor

from tests.support.hub import discussions, endpoints
from tests.support.hub.calls import Endpoint


class _Part(Convertor[str]):
    """A part of a path, matched before `%2F` becomes a slash."""

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        raise NotImplementedError("addresses are read here, never written")


class _Kind(_Part):
    regex = "models|datasets|spaces"

    def convert(self, value: str) -> str:
        return value.removesuffix("s")


class _Repo(_Part):
    regex = "[^/]+/[^/]+"


class _Revision(_Part):
    # HfFileSystem leaves the slashes of these references as they are.
    regex = "refs/(?:pr|convert)/[^/]+|[^/]+"


class _File(_Part):
    regex = ".+"


for _part in (_Kind, _Repo, _Revision, _File):
    register_url_convertor(_part.__name__.strip("_").lower(), _part())

_API = "/api/{kind:kind}/{repo:repo}"
_AT = "{revision:revision}"
_TALK = _API + "/discussions/{number:int}"

ROUTES: list[tuple[str, str, str, Endpoint]] = [
    ("whoami", "GET", "/api/whoami-v2", endpoints.whoami),
    ("create", "POST", "/api/repos/create", endpoints.create),
    ("delete", "DELETE", "/api/repos/delete", endpoints.delete),
    ("validate_yaml", "POST", "/api/validate-yaml", endpoints.validate_yaml),
    ("info", "GET", _API, endpoints.info),
    ("info", "GET", f"{_API}/revision/{_AT}", endpoints.info),
    ("auth_check", "GET", f"{_API}/auth-check", endpoints.auth_check),
    ("preupload", "POST", f"{_API}/preupload/{_AT}", endpoints.preupload),
    ("commit", "POST", f"{_API}/commit/{_AT}", endpoints.commit),
    ("branch", "POST", f"{_API}/branch/{_AT}", endpoints.add_branch),
    ("branch", "DELETE", f"{_API}/branch/{_AT}", endpoints.drop_branch),
    ("tag", "POST", f"{_API}/tag/{_AT}", endpoints.add_tag),
    ("tag", "DELETE", f"{_API}/tag/{_AT}", endpoints.drop_tag),
    ("tree", "GET", f"{_API}/tree/{_AT}", endpoints.tree),
    ("tree", "GET", f"{_API}/tree/{_AT}/{{path:file}}", endpoints.tree),
    ("paths_info", "POST", f"{_API}/paths-info/{_AT}", endpoints.paths_info),
    ("commits", "GET", f"{_API}/commits/{_AT}", endpoints.commits),
    ("refs", "GET", f"{_API}/refs", endpoints.refs),
    ("discussions", "GET", f"{_API}/discussions", discussions.listing),
    ("discussions", "POST", f"{_API}/discussions", discussions.discuss),
    ("discussion", "GET", _TALK, discussions.discussion),
    ("comment", "POST", f"{_TALK}/comment", discussions.comment),
    ("status", "POST", f"{_TALK}/status", discussions.change_status),
    ("merge", "POST", f"{_TALK}/merge", discussions.merge),
    ("lfs_put", "PUT", "/lfs/{key:str}", endpoints.lfs_put),
    *(
        route
        for start in ("/{kind:kind}/{repo:repo}", "/{repo:repo}")
        for route in (
            ("lfs_batch", "POST", f"{start}.git/info/lfs/objects/batch", endpoints.lfs_batch),
            ("resolve", "GET", f"{start}/resolve/{_AT}/{{path:file}}", endpoints.resolve),
        )
    ),
    *(
        (name, "GET", path, endpoints.unknown_repository)
        for name, path in (
            ("info", "/api/{kind:kind}/{name:str}"),
            ("info", f"/api/{{kind:kind}}/{{name:str}}/revision/{_AT}"),
            ("resolve", f"/{{name:str}}/resolve/{_AT}/{{path:file}}"),
            ("resolve", f"/{{kind:kind}}/{{name:str}}/resolve/{_AT}/{{path:file}}"),
        )
    ),
]
