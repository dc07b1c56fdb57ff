"""Events of runs that a server does not know: it was lost, or another one is named now."""

from pipeline.tracking.courier import Courier
from pipeline.tracking.delivery import UnknownRun
from pipeline.tracking.outbox import Outbox, set_aside


class Server:
    """Knows the runs it was told of; a run is made below its parent alone."""

    was_opened = True

    def __init__(self):
        self.runs, self.told = {None}, []

    def open(self):
        pass

    def forget(self):
        pass

    def apply(self, event):
        needed = event.data["parent"] if event.kind == "run" else event.data["run"]
        if needed not in self.runs:
            raise UnknownRun(needed)
        if event.kind == "run":
            self.runs.add(event.data["key"])
        self.told.append((event.kind, event.data.get("key", event.data.get("step"))))


def test_what_a_lost_server_knew_alone_holds_nothing_up_and_is_kept_in_a_file(tmp_path, capsys):
    outbox = Outbox(tmp_path, "http://new")
    outbox.append("metrics", {"run": "lost", "step": 7})
    outbox.append("run", {"key": "increment", "parent": "stream"})
    outbox.append("metrics", {"run": "increment", "step": 8})
    server = Server()
    courier = Courier(outbox, server)
    assert not courier.flush(10) and isinstance(courier.problem, UnknownRun), "the parent is not there yet"
    assert len(outbox) == 2 and [path.name for path in set_aside(tmp_path)] == ["0000000001.json.aside"]
    courier.send("run", {"key": "stream", "parent": None})  # as every launch does
    assert courier.flush(10)
    assert server.told == [("run", "stream"), ("run", "increment"), ("metrics", 8)]
    assert "what waited for it is put aside" in capsys.readouterr().err
    assert len(Outbox(tmp_path, "http://new")) == 0


def test_a_run_is_made_before_what_waits_for_it_and_its_parent_before_it(tmp_path):
    outbox = Outbox(tmp_path, "http://new")
    outbox.append("metrics", {"run": "increment", "step": 7})  # of a launch before; the server was lost meanwhile
    outbox.append("run", {"key": "increment", "parent": "stream"})
    outbox.append("run", {"key": "stream", "parent": None})
    server = Server()
    assert Courier(outbox, server).flush(10)
    assert server.told == [("run", "stream"), ("run", "increment"), ("metrics", 7)]
    assert len(outbox) == 0 and set_aside(tmp_path) == []
