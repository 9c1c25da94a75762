"""Which schedulers go with which searchers, budgets and spaces."""

from metadist.config_file import Document
from metadist.sweeps.lineage import SCHEDULES
from metadist.sweeps.search_space import Distribution
from metadist.sweeps.sweep import BudgetSettings, SchedulerSettings, SearcherSettings


def scheduler_problems(
    document: Document,
    scheduler: SchedulerSettings,
    searcher: SearcherSettings,
    budget: BudgetSettings,
    space: dict[str, Distribution],
) -> list[str]:
    """What does not go together, in sentences."""
    problems = []
    if scheduler.begins_all_at_once and searcher.learns:
        problems.append(
            f"searcher.name must be random with scheduler.name: {scheduler.name}, whose trials all begin before one has"
            f" told anything, got {searcher.name}{document.place(('searcher', 'name'))}. Use scheduler asha with it."
        )
    if scheduler.begins_all_at_once and budget.max_concurrent is not None:
        problems.append(
            f"budget.max_concurrent is not for scheduler.name: {scheduler.name}, whose trials wait for each other, got"
            f" {budget.max_concurrent}{document.place(('budget', 'max_concurrent'))}. Leave it out."
        )
    if scheduler.changes_rates:
        problems.extend(_population_problems(document, scheduler, searcher, budget, space))
    elif scheduler.perturb_every is not None:
        problems.append(
            f"scheduler.perturb_every is for pbt and pb2, got {scheduler.perturb_every} with {scheduler.name}"
            f"{document.place(('scheduler', 'perturb_every'))}. Leave it out."
        )
    return problems


def _population_problems(
    document: Document,
    scheduler: SchedulerSettings,
    searcher: SearcherSettings,
    budget: BudgetSettings,
    space: dict[str, Distribution],
) -> list[str]:
    """A population needs a rate to change, others to take over from, and an end of a generation before its own."""
    problems = []
    for key, distribution in space.items():
        place = document.place(("space", key))
        if key not in SCHEDULES:
            problems.append(
                f"space.{key} cannot change in mid-run, as scheduler.name: {scheduler.name} would have it{place}."
                f" Search {' and '.join(SCHEDULES)}, and put one value of it under overrides."
            )
        elif distribution.kind not in ("uniform", "loguniform"):
            problems.append(
                f"space.{key} must be an interval for scheduler.name: {scheduler.name}, got {distribution.kind}{place}."
                " Use loguniform(low, high)."
            )
    if searcher.name == "grid":
        problems.append(
            f"searcher.name must be random with scheduler.name: {scheduler.name}, got grid"
            f"{document.place(('searcher', 'name'))}. Change it."
        )
    if budget.trials < 2:
        problems.append(
            f"budget.trials must be >= 2 with scheduler.name: {scheduler.name}, got {budget.trials}"
            f"{document.place(('budget', 'trials'))}. A population of 8 or more is usual."
        )
    every = scheduler.perturb_every or budget.every
    if every % budget.every or every >= budget.steps:
        problems.append(
            f"scheduler.perturb_every must be a multiple of budget.every = {budget.every} and below budget.steps ="
            f" {budget.steps}, got {every}{document.place(('scheduler', 'perturb_every'))}. Change one of them."
        )
    return problems
