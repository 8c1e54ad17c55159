# ---
# jupyter:
#   jupytext:
#     cell_markers: '"""'
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A few examples tell the model which task is meant

A language model that is shown a few pairs, `France -> Paris`, goes on with the pair that is asked for, although nobody has told it what the
pairs have in common. This is in-context learning, and this notebook shows that the model at hand does it and how little it needs.

**Claim.** Before any example the prompt is ambiguous and the model spreads its bets over all tasks that the input allows; with the
first example accuracy jumps. What the examples tell is the kind of output that is wanted.

- You will see the tasks, a prompt with the role of each token, accuracy and loss by number of examples, and what the model believes
  before the first example.
- You need a CPU and a minute. By default this is the embedded model, `icl-tiny`: a working example, not the paper's result.
- Source: Kharlapenko et al. (2025), "Scaling Sparse Feature Circuits For Studying In-Context Learning" (ICL-SFC), Sec. 2 and Fig. 2.
"""

# %% tags=["hide-input"]
import random
from collections import defaultdict

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from icl_lib import embedded, figures
from icl_lib.behaviours import accuracy_table, published_accuracy
from icl_lib.cards.notebook import close_run, open_run
from icl_lib.figures.style import heatmap
from icl_lib.models import fetch, gate, generate, load_model, load_tokenizer
from icl_lib.runs import compute_dtype
from icl_lib.tasks import (
    Role,
    Task,
    Template,
    answer_accuracy,
    answer_nll,
    load_tasks,
    make_prompts,
    stack_prompts,
    token_logprobs,
)

# %% tags=["parameters", "hide-input"]
card: str = "tiny"  # name of the experiment card
model: str = "icl-tiny"  # name of an embedded model, hub id or folder of the model
tasks: str = "embedded"  # embedded, paper, function_vectors, or a folder of task files
prefix: str = "Follow the pattern:\n"  # opens a prompt; chat models may want a turn opened
run_dir: str = "runs/tiny"  # where results go, from the repository root
seed: int = 0  # seed of prompts, corpora, training and random draws
n_prompts: int = 16  # prompts per task
max_shots: int = 12  # examples in the longest prompts of notebook 00

# %% [markdown]
"""
Model, tokenizer and tasks, and the run's store and ledger.
"""

# %% tags=["hide-input"]
store, ledger = open_run("00_a_model_that_learns_in_context", globals())
lm = load_model(model, dtype=compute_dtype(), mesh="auto")
tokenizer = load_tokenizer(model)
suite, template = load_tasks(tasks), Template(prefix=prefix)
names, groups = list(suite), [task.group for task in suite.values()]
print(
    f"{lm.config.n_layers} layers, d_model {lm.config.d_model}, {lm.config.d_vocab} tokens, context of {lm.config.n_ctx}"
)

# %% [markdown]
"""
## The tasks

A task is a set of (input, output) pairs. The paper has four groups of them: knowledge, grammar, translation, and algorithmic ones. What matters is the last column: how many *other* tasks know a typical input. "France" has a capital, a currency,
a continent and a language, so the word alone cannot tell what is asked for. We expect most inputs to belong to several tasks.
"""

# %%
owners = defaultdict(list)  # input -> tasks that have it
for name, task in suite.items():
    for x, _ in task.pairs:
        owners[x].append(name)
rivals = {name: np.median([len(owners[x]) - 1 for x, _ in task.pairs]) for name, task in suite.items()}
rows = [
    {
        "task": t.name,
        "group": t.group,
        "pairs": len(t.pairs),
        "example": " → ".join(t.pairs[0]),
        "other tasks": int(rivals[t.name]),
    }
    for t in suite.values()
]
figures.style_table(pd.DataFrame(rows), caption=f"{len(suite)} tasks")

# %% tags=["nbval-check-output"]
print(f"{sum(len(tasks) == 1 for tasks in owners.values())} of {len(owners)} inputs belong to one task only")

# %% [markdown] tags=["icl-tiny"]
"""
No task has inputs of its own: all but 4 of the 944 inputs ("twenty", the end of a list, is one) belong to at least two tasks.
"""

# %% [markdown]
"""
## The prompt

One instruction, then pairs in the form `x -> y`. Every token has a role, found from its place in the text and not from its id; later
notebooks ask at which roles a latent fires.
"""

# %%
shown = "location_language" if "location_language" in suite else names[0]
example = make_prompts(suite[shown], tokenizer, n_prompts=1, n_shots=4, seed=seed, template=template)
figures.prompt_roles(
    tokenizer.convert_ids_to_tokens(example.tokens[0].tolist()), [Role(r) for r in example.roles[0].tolist()]
)
figures.show(
    1,
    "One prompt with the role of each of its tokens. A role is found from the place in the text; the "
    "vertical order of the colours is that of the legend.",
)

# %% [markdown]
"""
The query is the last pair; the model predicts its output at the last arrow. All measurements below are made there.
"""

# %% [markdown]
"""
## What the model was trained on

Of a model that comes with this repository we can look at the training text and at the loss of its training; of any other model this part stays empty.

Seven in ten training rows of `icl-tiny` are such prompts; the others are sentences that say the same facts in other words. Half of the prompts mix
two tasks and mark them by different arrows, `->` and `=>`. There only the arrow tells the task, so the model has to decide at the arrow
what to do, which is where larger models decide too (notebook 02).
"""

# %%
entry = embedded.entry(model)  # None for a model that does not come with the repository, and nothing is shown
if entry is not None:
    language, rng = entry.part("language").Language(), random.Random(seed)
    mixed = next(p for p in iter(lambda: language.prompt(rng, 4), None) if "=>" in p and "->" in p)
    print("text:  ", language.text(rng, 3).replace("\n", "\\n"))
    print("prompt:", language.prompt(rng, 3, interleaved=0.0).replace("\n", "\\n"))
    print("mixed: ", mixed.replace("\n", "\\n"))

# %% [markdown]
"""
Above, where there is something to show: a sentence, a prompt of one task, and one of two tasks. Below: the loss of training.
"""

# %%
if entry is not None:
    losses = np.loadtxt(entry.losses, skiprows=1)
    steps = np.arange(1, len(losses) + 1)
    smooth = pd.Series(losses).rolling(20, min_periods=1).mean()
    figures.training_curve(steps, {"each step": losses, "mean of 20 steps": smooth})
    figures.show(2, "The loss of training in nats per token: each step, and the mean of twenty steps.")

# %%
if entry is not None:
    fresh = embedded.open_corpus(entry.name, tokenizer, lm.config.n_ctx, bos_id=lm.config.bos_id).held_out(128)
    held_out = float(eqx.filter_jit(entry.part("pretrain").loss_fn)(lm, jnp.asarray(fresh)))
    print(
        f"loss on fresh rows: {held_out:.2f} nats per token; a uniform guess would be {np.log(lm.config.d_vocab):.1f}"
    )

# %% [markdown] tags=["icl-tiny"]
"""
The loss falls steeply in 400 steps and slowly on from there, although the residual noise comes on at step 450. That
noise, which stretches a row's residual at one layer and adds what its tokens always have, is there so that the model can take a vector added
to it as more of the same (`icl_lib/embedded/icl_tiny/pretrain.py`). On rows that the model has never seen the loss is 1.34, so the language is learned and
not the rows. Much of what is left is chance: which input a prompt or which noun a list goes on with.
"""

# %% [markdown]
"""
## Is it the model that was meant?

A wrong revision, a wrong tokenizer or rounded weights seldom raise an error; they make a model that is a little worse. Three checks. If the
folder carries logits of a fixed prompt, written by `gate.record(model, tokenizer, folder)`, the loaded model has to give them again, or
the next cell stops.
"""

# %%
difference = gate.check(lm, tokenizer, fetch(model))
print(
    "no logits are recorded for this model" if difference is None else f"the recorded logits, within {difference:.2g}"
)

# %% [markdown]
"""
Then what it writes: one task of each group, four examples, and the most probable tokens after the query's arrow. A model that was read wrongly
does not go on with a word of the right kind.
"""

# %%
some = list({task.group: task for task in suite.values()}.values())
asked = stack_prompts([make_prompts(t, tokenizer, n_prompts=1, n_shots=4, seed=seed, template=template) for t in some])
written = generate(lm, asked.tokens[:, 0], asked.query_arrow[:, 0] + 1, n_new=8)
for task, (text,), new in zip(some, asked.texts, written.tolist(), strict=True):
    print(f"{task.name}: asked {text.splitlines()[-1]!r}, went on with {tokenizer.decode(new)!r}")

# %% [markdown] tags=["icl-tiny"]
"""
All four answers are right. After them the model writes more pairs of the same task, also right ("llave" is Spanish, "ganso" is the Spanish
for "oca"), and then begins the next with a word that it has just used.
"""

# %% [markdown]
"""
The third check is the accuracy of every task by the published measure: at all arrows of prompts of `k` pairs, does the most probable token begin
with the first three characters of the right one? Pairs are drawn from all of the task. The first arrow, at which nothing tells the task, counts too,
so that a perfect score is out of reach. For Gemma-1 2B-it the published values stand beside ours.
"""

# %%
sizes = [k for k in (12, 24) if k <= max_shots] or [max_shots]
overview = accuracy_table(lm, tokenizer, suite, n_pairs=sizes, n_prompts=n_prompts, seed=seed, template=template)
published = published_accuracy(model)
if published is not None:
    overview = overview.merge(
        published.rename(columns=lambda c: c if c == "task" else f"{c} published"), on="task", how="left"
    )
store.save_table("accuracy_table", overview)
figures.style_table(overview, caption="accuracy at all arrows of prompts of k pairs")

# %% tags=["nbval-check-output"]
for k in sizes:
    values = overview.set_index("task")[f"acc@{k}"]
    print(f"{k} pairs: mean {values.mean():.2f}, lowest {values.idxmin()} {values.min():.2f}")

# %% [markdown] tags=["icl-tiny"]
"""
The mean is 0.92. 26 tasks lie between 0.92 and 0.98, which is all but the first arrow; `next_item` has 0.43 and `previous_item` 0.65, and we shall
see why. For the embedded model nothing is published; these numbers are what a later clone of it should print again.
"""

# %% [markdown]
"""
## Accuracy by number of examples

A causal model reads a prompt from the left, so one prompt with many examples holds all shorter ones: the output of its $i$-th pair is
predicted from the $i$ pairs before. One pass per task therefore gives the whole curve. Pairs come from the evaluation pool. We expect a
low start, since the task is not given, and a steep rise.
"""


# %%
@eqx.filter_jit
def by_shots(lm, prompts):
    """Hits and NLL (nats) of the first output token of every pair: two arrays (task, prompt, pair)."""

    def one(prompts):
        logits, targets = lm(prompts.tokens), prompts.tokens[:, 1:]
        first = prompts.mask(Role.OUTPUT, "first")[:, 1:, None]
        pick = first & (prompts.pair[:, 1:, None] == jnp.arange(prompts.n_shots + 1)[None, None])
        hit = jnp.argmax(logits[:, :-1], axis=-1) == targets
        values = jnp.stack([hit.astype(jnp.float32), -token_logprobs(logits, prompts.tokens)])
        return jnp.einsum("mbs,bsk->mbk", values, pick.astype(jnp.float32))

    return jnp.moveaxis(jax.lax.map(one, prompts), 1, 0)


# %% [markdown]
"""
Pairs of the evaluation pool only; the queries of later notebooks are drawn from the same pool.
"""

# %%
options = dict(n_prompts=n_prompts, seed=seed, pool="evaluation", template=template)
prompts = stack_prompts([make_prompts(t, tokenizer, n_shots=max_shots, **options) for t in suite.values()])
assert prompts.tokens.shape[-1] <= lm.config.n_ctx, f"prompts of {prompts.tokens.shape[-1]} tokens: lower max_shots"
hits, nll = (np.asarray(a) for a in by_shots(lm, prompts))
accuracy, shots = hits.mean(axis=1), np.arange(max_shots + 1)  # (task, shots)

# %%
figures.accuracy_vs_shots(shots, accuracy, groups)
figures.show(
    3,
    "Accuracy of the first output token against the number of examples before it. The thick line is the "
    "mean over tasks with its standard error; coloured lines are the groups and pale ones single tasks.",
)

# %% tags=["nbval-check-output"]
mean, error = accuracy.mean(axis=0), accuracy.std(axis=0, ddof=1) / np.sqrt(len(suite))
wanted = [k for k in (0, 1, 2, 3, 5, 8, 12) if k <= max_shots]
print("shots    ", *(f"{k:5d}" for k in wanted))
print("accuracy ", *(f"{mean[k]:5.2f}" for k in wanted))

# %% [markdown] tags=["icl-tiny"]
"""
**Accuracy goes from 0.33 without an example to 0.96 with one, and stays there.** 26 of the 28 tasks are at 1.00 from the first example on, so the
mean says little about them; what keeps it below 1 are two algorithmic tasks, to which we come.
"""

# %% [markdown]
"""
Before the first example, group by group:
"""

# %%
at = min(5, max_shots)
table = pd.DataFrame({"task": names, "group": groups, **{f"{k} shots": accuracy[:, k] for k in wanted}})
store.save_table("accuracy_by_shots", table)
figures.group_bars(accuracy[:, 0], groups, ylabel="accuracy without examples")
figures.show(
    4,
    "Accuracy without any example by group of tasks. A bar is the mean of a group with its standard "
    "error, a dot is one task.",
)

# %% tags=["nbval-check-output"]
print(pd.Series(accuracy[:, 0]).groupby(groups, sort=False).mean().round(2).to_string())

# %% [markdown] tags=["icl-tiny"]
"""
Without examples every group lies between 0.26 (knowledge) and 0.40 (algorithmic): about what a guess among three tasks would give.
"""

# %% [markdown]
"""
The tasks that are still hardest after five examples:
"""

# %%
hardest = table.sort_values(f"{at} shots").head(6)
figures.style_table(hardest.reset_index(drop=True), caption=f"lowest accuracy with {at} examples")

# %% [markdown] tags=["icl-tiny"]
"""
`next_item` and `previous_item` stay at 0.44 and 0.56. They have the same inputs *and* the same kind of outputs ("two" follows "one", "one"
comes before "two"): to tell them apart one has to look at how an example's output relates to its own input. Everywhere else the kind of
the outputs is enough, and that is what this model seems to look at. The controls below test it.
"""

# %% [markdown]
"""
## What the model believes before the first example

If the zero-shot prompt is ambiguous to the model, and not just unknown, then the probability is *on the answers of the competing tasks*.
We take the inputs that the same set of tasks shares (countries, say) and ask for the probability of each of those tasks' answers.
Each row should sum to nearly 1, divided about equally.
"""

# %%
domains = defaultdict(list)  # set of tasks -> the inputs they share
for x, found in owners.items():
    if len(found) > 1:
        domains[tuple(found)].append(x)
domains = {k: v for k, v in sorted(domains.items(), key=lambda item: -len(item[1])) if len(v) >= 10}
cells = [(i, name, set(xs)) for i, (found, xs) in enumerate(domains.items()) for name in found]

# %% [markdown]
"""
For each kind of input and each task that knows it: zero-shot prompts, and the probability of that task's answer.
"""


# %%
def shared(name, xs):
    """The part of a task whose inputs are in `xs`."""
    return Task(name, tuple(pair for pair in suite[name].pairs if pair[0] in xs), suite[name].group, "shared inputs")


@eqx.filter_jit
def query_scores(lm, prompts):
    """Hits and NLL (nats) of the first token of the query's answer: two arrays (task, prompt)."""

    def one(prompts):
        logits = lm(prompts.tokens)
        return jnp.stack([answer_accuracy(logits, prompts), answer_nll(logits, prompts, n_first=1)])

    return jnp.moveaxis(jax.lax.map(one, prompts), 1, 0)


# %%
zero_shot = dict(n_prompts=4 * n_prompts, n_shots=0, seed=seed, template=template)
_, scores = query_scores(lm, stack_prompts([make_prompts(shared(n, xs), tokenizer, **zero_shot) for _, n, xs in cells]))
belief = np.full(
    (len(domains), len(names)), np.nan
)  # mean probability of each task's answer, NaN where it does not compete
for (i, name, _), p in zip(cells, np.exp(-np.asarray(scores)).mean(axis=1), strict=True):
    belief[i, names.index(name)] = p

# %%
labels = [f"{xs[0]}, {xs[1]}, ... ({len(xs)})" for xs in domains.values()]
fig, ax = plt.subplots(figsize=(9, 4.4))
image = heatmap(ax, belief, labels, names, colour_label="probability of the task's answer")
image.set_cmap(plt.get_cmap("YlGnBu").with_extremes(bad="#d9d9d9"))  # grey is no colour of this scale
ax.set_title("no examples; grey: the task does not know the input")
figures.show(
    5,
    "The probability of each task's answer to an input that several tasks know. A row is a kind of input "
    "(two of them and their number), a column a task; grey means that the task does not know the input. "
    "Several dark cells in a row mean that the model does not know which task is meant.",
)

# %% tags=["nbval-check-output"]
total, best = np.nansum(belief, axis=1), np.nanmax(belief, axis=1)
even = np.array([1 / len(found) for found in domains])
print(f"{len(domains)} kinds of input; on known answers {total.mean():.2f} of the probability,")
print(f"on the favourite task {best.mean():.2f}; an even division would give it {even.mean():.2f}")
figures.say(
    f"**The model spreads its bets**: {total.mean():.2f} of the probability is on answers of tasks that know the input, and the favourite task has "
    f"{best.mean():.2f} of it, where an even division would give {even.mean():.2f}."
)

# %% [markdown] tags=["icl-tiny"]
"""
The favourite task gets 0.39 on average, an even division would give it 0.32: the model does not know which task is meant, and says so.
The known answers together have 0.94 of the probability. Only plurals, which have two tasks, have a favourite with more than half of it, their singular.
"""

# %% [markdown]
"""
## Controls: examples with the wrong outputs

Do the examples help because they show the task, or because more text of this form helps? Two controls, with the inputs and the query as
before. *Shuffled*: each output is another output of the same task, so the pairing is wrong but the outputs still show their kind
(capitals, plurals, French words). *Any task*: each output comes from a random task, so nothing is left but words and form. We expect
the second to be useless. About the first, the literature on large models says that the pairing matters surprisingly little.
"""

# %%
rng = random.Random(seed)
outputs = [y for task in suite.values() for _, y in task.pairs]


def any_task(task):
    """The task's evaluation inputs, each with the output of a random pair of a random task."""
    return [(x, rng.choice(outputs)) for x, _ in task.pool("evaluation")]


def examples(kind, task, n_shots):
    """Prompts of a task with right outputs, outputs shuffled within the task, or outputs of any task."""
    if kind == "any task":
        return make_prompts(
            task, tokenizer, n_shots=n_shots, **options | {"pool": any_task(task), "query_pool": "evaluation"}
        )
    return make_prompts(task, tokenizer, n_shots=n_shots, corrupt=kind == "shuffled", **options)


# %% [markdown]
"""
The three kinds of prompt go through the model together, at several numbers of examples.
"""

# %%
kinds, control_shots = ["right", "shuffled", "any task"], [k for k in (0, 1, 2, 5, 12) if k <= max_shots]
control = {kind: [] for kind in kinds}  # (accuracy | nll, task, shots) each
for k in control_shots:
    batch = [examples(kind, task, k) for kind in kinds for task in suite.values()]
    scores = (
        np.asarray(jnp.stack(query_scores(lm, stack_prompts(batch)))).mean(axis=2).reshape(2, len(kinds), len(suite))
    )
    for i, kind in enumerate(kinds):
        control[kind].append(scores[:, i])
control = {kind: np.stack(scores, axis=-1) for kind, scores in control.items()}

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
curves = {f"outputs: {kind}": values[1] for kind, values in control.items()}
figures.effect_vs_shots(control_shots, curves, ylabel="loss of the first answer token (nats)", ax=left)
behind = {"shuffled minus right": control["shuffled"][1] - control["right"][1]}
figures.effect_vs_shots(control_shots, behind, ylabel="loss of shuffled minus right (nats)", ax=right)
left.set(xlabel="examples in the prompt (shots)", yscale="log")
right.set(xlabel="examples in the prompt (shots)")
figures.show(
    6,
    "The loss of the first answer token with examples whose outputs are right, shuffled among the "
    "examples' task, or taken from any task; to the right what shuffling costs. Bands are standard errors"
    " over tasks.",
)

# %% tags=["nbval-check-output"]
five = control_shots.index(5) if 5 in control_shots else -1
right, shuffled, random_outputs = (control[kind][0][:, five] for kind in kinds)
print(f"accuracy with {control_shots[five]} examples")
print(f"standard error over tasks, right outputs: {right.std(ddof=1) / np.sqrt(len(right)):.2f}")
print(f"outputs right {right.mean():.2f}, shuffled {shuffled.mean():.2f}, any task {random_outputs.mean():.2f}")
print(f"outputs of any task are worse on {(random_outputs < right).sum()} of {len(suite)} tasks")
lost = [name for name, r, c in zip(names, right, shuffled, strict=True) if c < r - 0.1]
print("tasks that need the right pairing:", ", ".join(lost) or "none")

# %% [markdown] tags=["icl-tiny"]
"""
**The examples work by showing the kind of output.** Outputs of any task are worse than nothing: the loss rises from 1.3 to over 4 nats with one example, and accuracy with five is 0.35, hardly
better than without. Shuffled outputs, however, do *as well* as right ones (0.96 against 0.96), on all tasks. So
the fact itself comes from the weights. The same was found for large models that classify (Min et al., 2022,
"Rethinking the Role of Demonstrations"); and it fits what follows, where a single vector can stand for all examples.
"""

# %% [markdown]
"""
The claims of this notebook go to the ledger of the run.
"""

# %% tags=["nbval-check-output", "hide-input"]
ambiguous = [i for i, name in enumerate(names) if rivals[name] >= 1]  # tasks whose inputs other tasks share
few, zero, worse = accuracy[:, at].mean(), accuracy[ambiguous, 0].mean(), (random_outputs < right).mean()
claims = [
    ("tasks", 23, len(suite), "at least 23 tasks", len(suite) >= 23),
    ("accuracy_5_shots", None, few, "mean accuracy with 5 examples >= 0.95", few >= 0.95),
    ("accuracy_0_shots", None, zero, "without examples <= 0.5 where inputs are shared", zero <= 0.5),
    ("any_outputs", None, worse, "outputs of any task worse on >= 80 % of tasks", worse >= 0.8),
]
close_run(ledger, model, [(key, "Sec. 2", *rest[:-1], bool(rest[-1])) for key, *rest in claims])

# %% [markdown] tags=["icl-tiny"]
"""
## What we saw

- 28 tasks, none with inputs of its own; without examples accuracy is 0.33, and the probability is divided among the tasks that know the input.
- One example is enough for 26 tasks; the mean with five is 0.96 (standard error 0.03 over tasks).
- The kind of the outputs carries the task. Wrong pairs of the right kind are as good as right ones; outputs of any kind are useless.
"""

# %% [markdown] tags=["icl-tiny"]
"""
## Limits

The embedded model has seen all of these pairs in training: in context it finds the *task*, it does not learn new facts, and the pools
keep prompts apart, not knowledge. The jump at the first example is sharper than in large models, whose accuracy rises over several. Two
tasks that differ by direction alone are not solved. 16 prompts per task: single accuracies are good to about 0.1.
"""

# %% [markdown]
"""
## Next

[01_sparse_autoencoders](01_sparse_autoencoders.ipynb) takes this model's activations apart into latents;
[02_task_vectors](02_task_vectors.ipynb) finds where in the model the task is kept.
"""
