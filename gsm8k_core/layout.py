"""Where everything lies below artifacts/, and whether what a study starts from is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gsm8k_core.config import Config, ExpertIterationMethod, Gsm8kDataset, Settings
from gsm8k_core.data import SPLITS, local_folder, make_gsm8k
from gsm8k_core.differences import leaf_changes
from gsm8k_core.errors import DataError
from gsm8k_core.files import read_record

ARTIFACTS = "artifacts"
RUNS = f"{ARTIFACTS}/runs"


def run_dir(study_dir: str | Path, model: str, method: str, seed: int | str) -> Path:
    """The folder of one run in that of a study, wherever that lies."""
    return Path(study_dir, model, method, f"seed{seed}")


def one_of(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these names (nothing, if there are none)."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


@dataclass(frozen=True)
class Layout:
    """A study's paths, relative to the repository's root, as texts (Snakemake wants texts)."""

    config: Config

    @property
    def experiments(self) -> str:
        return f"{ARTIFACTS}/experiments/{self.config.study.name}"

    @property
    def results(self) -> str:
        return f"{ARTIFACTS}/results/{self.config.study.name}"

    def run(self, model: str, method: str, seed: int | str) -> str:
        """Folder of one cell; accepts wildcards too."""
        return str(run_dir(self.experiments, model, method, seed))

    def starting_weights(self, model: str) -> str:
        return f"{ARTIFACTS}/models/{model}"

    def trained_model(self, model: str, method: str, seed: int | str) -> str:
        """Folder of a cell's weights: the starting weights for the base model."""
        if self.config.methods[method].trains:
            return f"{self.run(model, method, seed)}/model"
        return self.starting_weights(model)

    def parent_model(self, model: str, method: str, seed: int | str) -> str:
        """Folder of the weights that a cell's training starts from: those of the same seed."""
        parent = self.config.parent_of(method)
        assert parent is not None
        return self.trained_model(model, parent, seed)

    def round_start(self, model: str, method: str, seed: int | str, round_number: int) -> str:
        """The weights that sample in a round of expert iteration: the last round's."""
        if round_number == 1:
            return self.parent_model(model, method, seed)
        return f"{self.run(model, method, seed)}/round{round_number - 1}/model"

    def round_parent(self, model: str, method: str, seed: int | str, round_number: int) -> str:
        """The weights that a round of expert iteration trains from."""
        settings = self.config.methods[method]
        assert isinstance(settings, ExpertIterationMethod)
        if settings.restart_from_parent:
            return self.parent_model(model, method, seed)
        return self.round_start(model, method, seed, round_number)

    def data(self, dataset: str) -> str:
        """Folder of a dataset, or of reasoning traces; accepts wildcards too."""
        return f"{ARTIFACTS}/{dataset}"

    def problems(self, dataset: str, split: str) -> str:
        return f"{self.data(dataset)}/{split}.jsonl"

    def log(self, rule: str, name: str) -> str:
        """Log of a job that prepares `name` for every study; accepts wildcards too."""
        return f"{ARTIFACTS}/logs/{rule}/{name}.log"

    def benchmark(self, rule: str, name: str) -> str:
        """The same of what Snakemake measures of it."""
        return f"{ARTIFACTS}/benchmarks/{rule}/{name}.tsv"

    def train_problems(self, split: str = "train") -> str:
        return self.problems(self.config.study.dataset, split)

    def train_data(self, method: str) -> str:
        """The problems that a method learns from, see `Config.dataset_of`."""
        return self.problems(self.config.dataset_of(method), "train")

    def training_files(self) -> list[str]:
        """The `train` split of every dataset that a method of the study learns from."""
        files = [self.train_problems(), *map(self.train_data, self.config.stages())]
        return list(dict.fromkeys(files))

    def datasets(self) -> list[str]:
        """The datasets that the study learns from or is measured on, each once.

        Those whose questions its reasoning traces answer are among them.
        """
        files = [*self.training_files(), *self.suite_files()]
        names = [Path(path).parent.name for path in files]
        asked = [self.config.traces[name].dataset for name in names if name in self.config.traces]
        return list(dict.fromkeys([*names, *asked]))

    def missing_paths(self) -> list[str]:
        """Each `path` of a model or dataset of the study that does not hold its files, by its key.

        Snakemake would take what was once prepared under that name instead, without a word. That is
        right where it was prepared with these very settings: results go on without their sources.
        """
        problems = []
        for name in self.config.study.models:
            model = self.config.models[name]
            if model.source == "path" and model.path is not None:
                problem = _missing_in(model.path, ["config.json"])
                folder = self.starting_weights(name)
                if problem and not is_prepared(folder, model.starting_weights()):
                    problems.append(f"models.{name}.path: {problem}; name the folder of a model")
        for name in self.prepared_datasets():
            dataset = self.config.datasets[name]
            if isinstance(dataset, Gsm8kDataset) and dataset.path:
                files = ["train.jsonl", "test.jsonl"]
                problem = _missing_in(dataset.path, files)
                if problem and not is_prepared(self.data(name), dataset):
                    problems.append(
                        f"datasets.{name}.path: {problem}; name a folder with {' and '.join(files)}"
                    )
        return problems

    def faults_in_own_data(self) -> list[str]:
        """What is wrong with the rows in each `path` of a dataset of the study, by its key.

        What is newer than what was prepared of it is read, and what nothing was prepared of.
        """
        faults = []
        for name in self.prepared_datasets():
            dataset = self.config.datasets[name]
            if not isinstance(dataset, Gsm8kDataset) or not dataset.path:
                continue
            sources = [Path(dataset.path).expanduser() / f"{split}.jsonl" for split in SPLITS]
            if not all(source.is_file() for source in sources):
                continue  # `missing_paths` says so, where nothing was prepared
            if is_prepared(self.data(name), dataset):
                made = Path(self.data(name), "manifest.json").stat().st_mtime_ns
                if all(source.stat().st_mtime_ns <= made for source in sources):
                    continue
            faults += self.faults_in_rows(name)
        return faults

    def faults_in_rows(self, name: str) -> list[str]:
        """What is wrong with the rows of the dataset `name`, if they lie on this machine.

        A job would find it too, after Snakemake has removed what it had made of the rows before,
        and with that every run.
        """
        dataset = self.config.datasets[name]
        if isinstance(dataset, Gsm8kDataset) and local_folder(dataset):
            try:
                make_gsm8k(dataset)
            except DataError as error:
                return [f"datasets.{name}: {error}"]
        return []

    def prepared_otherwise(self) -> list[str]:
        """Each model and dataset of the study that lies prepared from other settings, and which.

        Where a call needs them Snakemake makes them again, and all that was made from them.
        """
        wanted: dict[str, Settings] = {
            self.starting_weights(name): self.config.models[name].starting_weights()
            for name in self.config.study.models
        }
        for name in self.prepared_datasets():
            wanted[self.data(name)] = deciding(self.config.datasets[name])
        differing = []
        for folder, settings in wanted.items():
            recorded = _recorded_settings(folder)
            if recorded is None:
                continue
            made = _in_todays_form(recorded, settings)
            was = recorded if made is None else made.model_dump(mode="json")
            if changes := leaf_changes(was, settings.model_dump(mode="json")):
                told = (f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items())
                differing.append(f"{folder} ({', '.join(told)})")
        return differing

    def prepared_datasets(self) -> list[str]:
        """The datasets that jobs of the study read: what is only evaluated learns from none."""
        trains = any(self.config.methods[method].trains for method in self.config.stages())
        of_suites = [self.config.suites[name].dataset for name in self.config.study.suites]
        names = self.datasets() if trains else of_suites
        return [name for name in dict.fromkeys(names) if name in self.config.datasets]

    def suite_files(self) -> list[str]:
        """The problems of the study's suites, each file once."""
        suites = [self.config.suites[name] for name in self.config.study.suites]
        return list(dict.fromkeys(self.problems(suite.dataset, suite.split) for suite in suites))

    def problems_of_suites(self) -> list[str]:
        """`suite=file` for each suite of the study."""
        suites = {name: self.config.suites[name] for name in self.config.study.suites}
        return [
            f"{name}={self.problems(suite.dataset, suite.split)}" for name, suite in suites.items()
        ]

    def trained(self, pattern: str) -> list[str]:
        """`pattern` (`train/metrics.jsonl`) of every cell that was trained."""
        return [
            f"{self.run(model, method, seed)}/{pattern}"
            for model, method, seed in self.cells()
            if self.config.methods[method].trains
        ]

    def cells(self) -> list[tuple[str, str, int]]:
        """(model, method, seed) of every run that the study compares."""
        return [
            (model, method, seed)
            for model in self.config.study.models
            for method in self.config.study.methods
            for seed in self.config.seeds_of(method)
        ]

    def evaluated(self, pattern: str) -> list[str]:
        """`pattern` (`metrics/{suite}.json`, `grades/{suite}.parquet`) of every cell and suite."""
        return [
            f"{self.run(*cell)}/{pattern.format(suite=suite)}"
            for cell in self.cells()
            for suite in self.config.study.suites
        ]


def deciding(settings: Settings) -> Settings:
    """What of a model's or a dataset's settings decides it: not where problems are had from."""
    return settings.without_source() if isinstance(settings, Gsm8kDataset) else settings


def is_prepared(folder: str | Path, settings: Settings) -> bool:
    """Whether `folder` holds what the settings of a model or dataset ask for."""
    return _in_todays_form(_recorded_settings(folder), settings) == deciding(settings)


def _recorded_settings(folder: str | Path) -> Any:
    """The settings that `folder` was prepared from, as they stand there; None without any."""
    return read_record(Path(folder, "manifest.json")).get("settings")


def _in_todays_form(recorded: Any, like: Settings) -> Settings | None:
    """What decides of recorded settings, with what has been added since; None of another kind."""
    try:
        return deciding(type(like).model_validate(recorded))
    except ValidationError:
        return None


def _missing_in(path: str, names: list[str]) -> str:
    """What is missing of the files `names` in the folder `path`; empty where all are there."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"no folder {path!r}"
    missing = [name for name in names if not (folder / name).is_file()]
    return f"no {' and no '.join(missing)} in {path!r}" if missing else ""
