"""The server that PREFECT_API_URL names: is it there?"""

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from flows.errors import DeployError


def check_server() -> str:
    """The API's URL. Raises DeployError where no server answers there, or it does without its database."""
    url = PREFECT_API_URL.value()
    if not url:
        raise DeployError(
            "Deployments need a Prefect server, and PREFECT_API_URL names none. Start one (`prefect server start`) and "
            "set PREFECT_API_URL=http://HOST:4200/api; or use `python -m flows serve`, which starts its own."
        )
    try:
        with get_client(sync_client=True) as client:
            status = client._client.get("/ready", timeout=20).status_code
            client.read_work_pools(limit=1)  # which wants the credentials that `/ready` does without
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
    except Exception as error:  # whatever a network does
        raise DeployError(
            f"No Prefect server answers at {url} ({type(error).__name__}). Check PREFECT_API_URL, and that `prefect "
            "server start` runs there."
        ) from error
    if status in (401, 403):
        raise DeployError(
            f"The Prefect server at {url} refuses the credentials of this machine (HTTP {status}). Set "
            "PREFECT_API_AUTH_STRING, or PREFECT_API_KEY where it is Prefect Cloud."
        )
    if status != 200:
        raise DeployError(
            f"The Prefect server at {url} answers, but is not ready (HTTP {status}): most likely it cannot reach its "
            "database. Check PREFECT_SERVER_DATABASE_CONNECTION_URL where it runs, and its log."
        )
    return str(url)


def check_server_if_named() -> None:
    """For what starts a server of its own where none is named. Raises DeployError as `check_server`."""
    if PREFECT_API_URL.value():
        check_server()
