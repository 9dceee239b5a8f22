"""Thousands of malformed requests to a running cluster, with a good one behind each."""

from asking import Server
from sweep import Doors, run_sweep


def test_nothing_malformed_breaks_a_cluster(server: Server) -> None:
    doors = Doors(http=server.http.removeprefix("http://"), grpc=server.grpc, model=server.model, key=server.key)
    result = run_sweep(doors)
    assert result.num_cases >= 300
    assert not result.failures, "\n".join(result.failures)
