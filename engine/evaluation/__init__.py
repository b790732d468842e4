"""Evaluation of a trained model by each data set's official rule: `evaluate` gives `TaskScores` by task."""

from engine.evaluation.run import evaluate
from engine.evaluation.scores import Group, TaskScores

__all__ = ["Group", "TaskScores", "evaluate"]
