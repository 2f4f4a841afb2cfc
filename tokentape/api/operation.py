"""How the installation is: status, jobs, who the caller is, liveness and readiness."""

from __future__ import annotations

from typing import Any

from ingest.gateway import bodies as b
from ingest.gateway.keys import Role
from ingest.gateway.problems import Problem
from lifecycle.scheduler import find, run_job
from schemas.errors import TokentapeError
from tokentape import __version__
from tokentape.api.access import ANYBODY
from tokentape.api.desk import Desks
from tokentape.api.routing import Call, Reply, Route
from tokentape.api.work import Work
from tokentape.jobs import all_jobs
from tokentape.status import collect

WATCHED_S = 5.0
"""How old what is watched may be: a page asks for it every few seconds, and Kafka is asked anew each time."""

OPERATORS: frozenset[Role] = frozenset({"custodian"})


def who(call: Call) -> Reply:
    """Who the caller is to this installation."""
    principal = call.principal
    told = {"name": principal.name, "roles": list(principal.roles), "tenant": principal.tenant, "keyed": principal.owner is not None}
    return Reply({**told, "version": __version__, "auth": call.desks.installation.settings.gateway.auth})


def status(call: Call) -> Reply:
    """What runs, how fresh the index is, what is missing, storage, locks, proof, what is watched and what is not well."""
    return Reply({**collect(call.desks.installation, age_s_max=WATCHED_S), "completeness": call.desks.completeness()})


def list_jobs(call: Call) -> Reply:
    """Lifecycle jobs, what has run, and what callers began."""
    jobs = [{"name": job.name, "does": job.description, "every_s": job.every_s} for job in all_jobs(call.desks.installation)]
    runs = [
        {
            "job": run.job,
            "trigger": run.trigger,
            "started_at": run.started_at,
            "finished_at": run.finished_at,
            "outcome": run.outcome,
            "summary": run.summary,
        }
        for run in call.desks.runs.history(limit=50)
    ]
    return Reply({"jobs": jobs, "runs": runs, "work": [_line(work) for work in call.desks.works.all(call.principal)]})


def _line(work: Work) -> dict[str, Any]:
    return {name: value for name, value in work.document().items() if name != "result"}


def show_job(call: Call) -> Reply:
    """One piece of work, with its result once it is done; what it tells of a session is for who may read it."""
    work = call.desks.works.find(call.principal, call.ids["job"])
    _may_read(call, work)
    return Reply(work.document())


def cancel_job(call: Call) -> Reply:
    """Have it end."""
    work = call.desks.works.find(call.principal, call.ids["job"])
    if work.principal.name != call.principal.name and "admin" not in call.principal.roles:
        raise Problem(403, f"{work.principal.name} began this job", "who began it, or an admin, cancels it")
    call.desks.works.cancel(work)
    return Reply(work.document(), 202)


def _may_read(call: Call, work: Work) -> None:
    if work.kind.startswith("replay"):
        call.desks.gate.session(call.principal, work.subject)


def begin_job(call: Call) -> Reply:
    """Run a lifecycle job now."""
    job = find(all_jobs(call.desks.installation), call.ids["name"])

    def act(work: Work) -> Any:
        with call.desks.custody:
            return run_job(job, call.desks.runs, trigger=call.principal.name)

    work = call.desks.works.begin(f"job {job.name}", job.name, call.principal, act)
    return Reply(work.document(), 202, {"location": f"/api/v1/jobs/{work.work_id}"})


def ready(desks: Desks) -> Reply:
    """Whether questions can be answered: the catalog opens and the log answers."""
    try:
        desks.freshen()
        desks.completeness()
    except TokentapeError as error:
        return Reply({"status": "not ready", "detail": str(error)}, 503)
    return Reply({"status": "ready"})


_JOB = b.record("job state", job=b.TEXT, state=b.TEXT)

ROUTES = (
    Route("GET", "/me", "me", "Who the caller is.", ANYBODY, who, answer=b.record("name roles")),
    Route("GET", "/status", "status", "How the installation is.", ANYBODY, status, answer=b.record("running storage")),
    Route("GET", "/jobs", "list_jobs", "Jobs, and what has run.", ANYBODY, list_jobs, answer=b.record("jobs runs work")),
    Route("GET", "/jobs/{job}", "show_job", "One piece of work.", ANYBODY, show_job, answer=_JOB, content=True),
    Route("DELETE", "/jobs/{job}", "cancel_job", "Cancel it.", ANYBODY, cancel_job, answer=_JOB, status=202),
    Route("POST", "/jobs/{name}/runs", "run_job", "Run a lifecycle job now.", OPERATORS, begin_job, answer=_JOB, status=202),
)
