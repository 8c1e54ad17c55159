"""Tasks as input-output pairs, prompts made of them with the role of every token, free text as tokens, and the metrics
read from logits.
"""

from icl_lib.tasks.free_text import Texts, encode_text
from icl_lib.tasks.metrics import answer_accuracy, answer_nll, pair_accuracy, pair_logit, pair_logprob, token_logprobs
from icl_lib.tasks.prompts import Prompts, make_prompts, stack_prompts
from icl_lib.tasks.tables import read_table
from icl_lib.tasks.tasks import Task, UnknownTask, load_tasks, select_tasks
from icl_lib.tasks.template import Role, Template

__all__ = [
    "Prompts", "Role", "Task", "Template", "Texts", "UnknownTask", "answer_accuracy", "answer_nll", "encode_text",
    "load_tasks", "make_prompts", "pair_accuracy", "pair_logit", "pair_logprob", "read_table", "select_tasks",
    "stack_prompts", "token_logprobs",
]  # fmt: skip
