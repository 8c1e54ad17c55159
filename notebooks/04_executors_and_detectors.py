# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# Detectors see that a task was done, executors at the arrow do it

**Claim.** For most tasks one latent, added alone at the arrow of a zero-shot prompt, does a good part of what the task vector does. Such
*executors* fire on arrows. Other latents, *detectors*, fire on the outputs of the examples, and the executors hang on them.

- You will see which latent executes which task, against random latents, in dictionaries of other widths and sparsities, and from both
  sides (added and taken away); where executors and detectors fire, in prompts and in plain text; how a detector alone changes the task; and which executor goes when a detector is ablated.
- You need the cleaned task vectors of notebook 03, the SAEs trained in notebook 01, a CPU and two minutes.
- Source: Kharlapenko et al. (2025), "Scaling Sparse Feature Circuits For Studying In-Context Learning" (ICL-SFC), Secs. 3.2, 4.2 and
  4.3, Figs. 4, 5, 7, 8, Tables 1 and 2, App. F and G.

By default all numbers are about the embedded model, `icl-tiny`: a working example, not the paper's result.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from icl_lib import figures
from icl_lib.features import activation_mass, detector_executor, display_strength, random_latents, top_examples
from icl_lib.figures.style import heatmap
from icl_lib.models import Site, load_model, load_tokenizer, mesh_of, run_with_cache
from icl_lib.runs import Ledger, Store, compute_dtype, devices, resolve
from icl_lib.saes import load_sae, load_suite
from icl_lib.tasks import Role, Template, load_tasks, make_prompts, stack_prompts
from icl_lib.tiny.retrain import held_out_corpus
from icl_lib.vectors import (
    base_nll,
    clean,
    cut,
    inserted_nll,
    latent_directions,
    latent_nll,
    negative_steering,
    output_vector,
    relative_change,
)

# %% tags=["parameters"]
card: str = "tiny"  # name of the experiment card
model: str = "assets/icl-tiny"  # folder or hub id of the model
saes: list[str] = ["assets/icl-tiny/saes"]  # folder of the SAE suite, or folders and hub paths with {layer} in them
sae_layers: list[int] = [0, 1, 2, 3, 4, 5]  # layers whose SAEs are loaded, counted as their files do
tasks: str = "embedded"  # embedded, paper, function_vectors, or a folder of task files
prefix: str = "Follow the pattern:\n"  # what stands before the pairs of a prompt; chat models may want a turn opened
run_dir: str = "runs/tiny"  # where results go, from the repository root
seed: int = 0  # seed of every prompt sampler and random draw
n_shots: int = 12  # examples in a prompt
n_prompts: int = 16  # prompts per task
layer_executor: int = 4  # layer (resid_pre) whose latents are tried at the arrow
layer_detector: int = 3  # layer (resid_pre) whose latents are tried at the outputs
scale_executor: float = -1.0  # length of an executor's direction; below 0: the best of a sweep on other pairs
scale_detector: float = -1.0  # the same for detectors
sweep_widths: list[int] = [256, 512, 1024]  # widths of the SAEs trained in notebook 01, which 03 and 04 try as well; [] trains none
detector_l1: float = 3.0e-3  # L1 penalty of the cleaning of detectors, in nats per unit of activation
detector_lr: float = 0.3  # its learning rate
detector_patience: int = 50  # its steps without a smaller L0 before it stops
detector_steps: int = 100  # its most steps

# %%
figures.use_style()
devices.setup(run_dir)
store = Store(run_dir, params={"card": card, "model": model, "saes": saes, "tasks": tasks, "seed": seed})
ledger = Ledger(store, "04_executors_and_detectors")
lm, tokenizer = load_model(resolve(model), dtype=compute_dtype(), mesh="auto"), load_tokenizer(resolve(model))
suite = load_suite(resolve(saes), lm.config, sae_layers, sites=["resid_pre"], mesh=mesh_of(lm))
task_list, template = list(load_tasks(tasks).values()), Template(prefix=prefix)
names, n_tasks = [task.name for task in task_list], len(task_list)
sae_executor, sae_detector = (suite[Site("resid_pre", layer)].fold() for layer in (layer_executor, layer_detector))
keys = dict(zip(("executors", "detectors", "links"), jax.random.split(jax.random.key(seed), 3), strict=True))


# %%
def prompts(pool, n_shots, offset, n=n_prompts, **kinds):
    """Prompts of every task from one pool of its pairs, stacked."""
    options = {"n_prompts": n, "n_shots": n_shots, "seed": seed + offset, "pool": pool, "template": template, **kinds}
    return stack_prompts([make_prompts(task, tokenizer, **options) for task in task_list])


def decrease(sae, where, latents, scale):
    """Relative loss decrease (task, latent) with each latent's direction, `scale` long, added at the cut token."""
    nll = latent_nll(lm, sae, where, jnp.asarray(latents), scale)
    return -np.asarray(relative_change(nll, base_nll(lm, where)))


def active_latents(sae, shown):
    """(d_sae,) latents that fire on any token of the prompts."""
    fires = lambda p: (sae.encode(run_with_cache(lm, p, [sae.site_in])[1][sae.site_in]) > 0).any(axis=(0, 1))
    return np.any([fires(p) for p in shown.tokens], axis=0)


# %% [markdown]
r"""
## Candidates and the length of a direction

Candidates are all latents that survived task vector cleaning in some task (notebook 03). Each is tried alone, on every task: the vector
$s\,W_{dec}[f]/|W_{dec}[f]|$ is added to the residual stream at the arrow of zero-shot prompts, and we report the relative loss decrease
$(L_0 - L_f)/L_0$.

The length $s$ is one number for all latents and tasks. We choose it on the *optimisation* pairs, as the one at which the best latent of
a task stands highest above the 95th percentile of latents drawn at random. We expect it to be near the norm of the residual stream itself:
much shorter changes nothing, much longer breaks everything.
"""

# %%
cleaned, meta = store.load("cleaned", expect={"tasks": names, "layer": layer_executor})
survives, encoded = cleaned["f"] > 0, cleaned["encoded"] > 0
candidates = np.flatnonzero(survives.any(axis=0))
choosing, testing = (cut(lm, prompts(pool, 0, offset), layer_executor) for pool, offset in (("optimisation", 1), ("evaluation", 2)))
many_shots = prompts("evaluation", n_shots, 3)
alive = active_latents(sae_executor, many_shots)
others = random_latents(alive, min(100, int(alive.sum() - alive[candidates].sum())), candidates, key=keys["executors"])
print(
    f"{len(candidates)} candidates of {sae_executor.d_sae} latents; {alive.sum()} latents fire in the prompts, {len(others)} serve as control"
)


# %%
def sweep(sae, where, latents, control, multiples=(0.25, 0.5, 0.75, 1.0, 1.5)):
    """Lengths (k,), best decrease per task (task, k), and its margin over the 95th percentile of the control (k,)."""
    norm = float(jnp.linalg.norm(where.resid[..., 0, :], axis=-1).mean())
    lengths = norm * np.array(multiples)
    best = np.stack([decrease(sae, where, latents, s).max(axis=1) for s in lengths], axis=1)
    high = np.stack([np.percentile(decrease(sae, where, control, s), 95, axis=1) for s in lengths], axis=1)
    return norm, lengths, best, high


def clearest(lengths, best, high):
    """The length at which the best latent stands highest above the control; harm counts as no effect."""
    return float(lengths[(np.maximum(best, 0) - np.maximum(high, 0)).mean(axis=0).argmax()])


norm, lengths, best, high = sweep(sae_executor, choosing, candidates, others)
chosen = scale_executor if scale_executor > 0 else clearest(lengths, best, high)
figures.scale_sweep(lengths, {"best candidate": best, "random, 95th percentile": high}, chosen=round(chosen, 1))
plt.show()

# %% tags=["nbval-check-output"]
print(f"executor scale: {chosen / norm:.2g} x the norm of the residual stream at the arrow")

# %% [markdown]
"""
It is three quarters of that norm. The best candidate alone takes most from the loss at half the norm, but there random latents help too (their
95th percentile is at a third of the loss): on an undecided model almost any push helps a little. At three quarters they help less.
"""

# %% [markdown]
"""
## Which latent executes which task

From here on the numbers come from the *evaluation* pairs, which nothing was chosen on. Each row of the first figure is divided by its
largest value and what is then below 0.2 is not shown, as in the paper; the second shows the raw decrease with two marks: which latents
the SAE finds in the task vector, and which of them survive cleaning. We expect one bright cell or two per row, near the diagonal, and
shared columns for tasks of one family.
"""

# %%
effect = decrease(sae_executor, testing, candidates, chosen)
figures.task_latent_heatmap(effect, names, candidates, n_latents=24, what=f"latent of layer {layer_executor}, the 24 strongest")
plt.show()

# %% [markdown]
"""
The diagonal is there: most rows have one bright cell, and most columns belong to one family. Tasks with the same target language share a
latent, whatever the source language (865 French, 758 Spanish, 450 English words); those that ask for a language share several, and
those that answer with a country one. Two rows are dark because their latents are not among the 24.

Now the raw decrease, for all candidates.
"""

# %%
marks = {"encoded": encoded[:, candidates], "survives": survives[:, candidates]}
figures.task_latent_heatmap(effect, names, candidates, normalised=False, **marks, what=f"latent of layer {layer_executor}, all candidates")
plt.show()

# %% tags=["nbval-check-output"]
executors = candidates[decrease(sae_executor, choosing, candidates, chosen).argmax(axis=1)]
own_effect = effect[np.arange(n_tasks), np.searchsorted(candidates, executors)]
print(f"{len(set(executors.tolist()))} executors serve {n_tasks} tasks; mean decrease by the executor alone {own_effect.mean():.2f}")

# %% [markdown]
"""
Cleaning finds most of what works: bright cells carry a green dot. It is not complete, though: several bright cells have none, because a
latent that is not in the encoding of a task vector cannot survive in it. `next_item` and `previous_item` stay dark: one latent survives in
each, and it does nothing alone.
"""

# %% [markdown]
"""
## Are they better than other latents?

Any push at the arrow can lower the loss somewhat, when the model is unsure between many tasks. The control is 100 latents that are active
in the same prompts but are no candidates, added at the same length. The executor of a task was picked on the optimisation pairs, so
its decrease below is not the best of many. The bar: a decrease of 20 % or more, above the 95th percentile of the control, on 18 tasks
or more and on 78 % of them (18 of 23).
"""

# %%
control = decrease(sae_executor, testing, others, chosen)
figures.latent_control(own_effect, control, names)
plt.show()

# %% tags=["nbval-check-output"]
passes = (own_effect >= 0.2) & (own_effect > np.percentile(control, 95, axis=1))
print(
    f"{passes.sum()} of {n_tasks} tasks have an executor; without: {', '.join(n for n, p in zip(names, passes, strict=True) if not p) or 'none'}"
)

# %% [markdown]
"""
24 of 28 tasks have one (the paper's Fig. 5: 22 of 23). A random direction of this length mostly does harm, up to fourteen times the loss, so the
executor's gain of 0.71 on average is not due to the push but to its direction. Of the four that miss, two are the sequences, where cleaned task
vectors do little as well. For `plural_singular` one of the candidates would pass (450), but another was ahead on the optimisation pairs; `fr_it` has none.
"""

# %% [markdown]
"""
## Does it depend on the dictionary?

The same question for the SAEs that notebook 01 trained, of several widths and sparsities: how many tasks have one latent that executes them?
Candidates are again the latents that survived cleaning in that SAE (notebook 03), the length is the one used above, executors are
picked on the optimisation pairs, and the bar is the same: 20 % on evaluation pairs, above the 95th percentile of random active latents.
To be quick this runs on fewer prompts and draws 32 random latents a dictionary. Too narrow a
dictionary cannot spare a latent for a task, too dense a one might spread it over several. We expect most executors in between.
"""

# %%
few = lambda pool, offset: cut(lm, prompts(pool, 0, offset, n=n_prompts // 2), layer_executor)
choosing_few, testing_few = few("optimisation", 1), few("evaluation", 2)
shown_few = many_shots.tokens[:, : n_prompts // 4].reshape(-1, many_shots.tokens.shape[-1])


def decrease_of(where, directions):
    """Relative loss decrease (task, direction) of directions (direction, d_model) for all tasks, or of (task, direction, d_model)."""
    every = jnp.broadcast_to(directions, (n_tasks, *directions.shape[-2:]))
    return -np.asarray(relative_change(inserted_nll(lm, where, every), base_nll(lm, where)))


def directions_in(folder, survives, n_control=32):
    """Directions (latent, d_model) of the candidates of another SAE, and of random latents that fire in the prompts."""
    sae = load_sae(store.run_dir / folder).fold()
    found = np.flatnonzero(survives.any(axis=0))
    fires = np.asarray((sae.encode(resid_few) > 0).any(axis=(0, 1)))
    drawn = random_latents(fires, min(n_control, int(fires.sum() - fires[found].sum())), found, key=keys["executors"])
    return latent_directions(sae, found, chosen), latent_directions(sae, drawn, chosen)


# %% [markdown]
"""
All latents of all dictionaries are tried in one call: what differs is only the direction that is added.
"""

# %%
dictionaries = store.load_table("sae_sweep", expect={"model": model}) if sweep_widths else pd.DataFrame({"folder": []})
if sweep_widths:
    survivors, _ = store.load("cleaned_sweep", expect={"model": model, "tasks": names, "layer": layer_executor})
    at = sae_executor.site_in
    resid_few = run_with_cache(lm, shown_few, [at])[1][at]
    pairs = [directions_in(folder, survivors[folder]) for folder in dictionaries["folder"]]
    ends_found, ends_drawn = (np.cumsum([len(pair[i]) for pair in pairs])[:-1] for i in (0, 1))
    on_choosing = np.split(decrease_of(choosing_few, jnp.concatenate([found for found, _ in pairs])), ends_found, axis=1)
    random_few = np.split(decrease_of(testing_few, jnp.concatenate([drawn for _, drawn in pairs])), ends_drawn, axis=1)
    picked = jnp.stack([found[scores.argmax(axis=1)] for (found, _), scores in zip(pairs, on_choosing, strict=True)], axis=1)
    own_few = decrease_of(testing_few, picked)
    bars = np.stack([np.percentile(effects, 95, axis=1) for effects in random_few], axis=1)
    dictionaries["tasks"] = ((own_few >= 0.2) & (own_few > bars)).sum(axis=0)
    dictionaries["effect"] = own_few.mean(axis=0)
    dictionaries["candidates"] = [len(found) for found, _ in pairs]

# %%
if sweep_widths:
    fig, panels = plt.subplots(1, 3, figsize=(9.6, 3.1), layout="constrained")
    labels = {"tasks": f"tasks with an executor (of {n_tasks})", "effect": "mean loss decrease by the executor", "candidates": "candidates"}
    for ax, (column, label) in zip(panels, labels.items(), strict=True):
        figures.width_lines(dictionaries, column, ax=ax)
        ax.set(ylabel=label, ylim=(0, None))
    panels[0].set_ylim(0, n_tasks + 0.5)
    panels[0].legend(loc="lower center")
    plt.show()

# %% tags=["nbval-check-output"]
if sweep_widths:
    for what, digits in {"tasks": 0, "effect": 2}.items():
        print(f"{what}:\n{dictionaries.pivot(index='d_sae', columns='sparsity', values=what).round(digits).to_string()}")

# %% [markdown]
"""
In every dictionary 21 to 27 of 28 tasks have an executor, and in all but one that is enough for the bar (78 %). The exception has 512 latents and is
dense. The narrowest have 23 to 25 tasks and a mean decrease of 0.55 to 0.64; 1,024 latents have 26 or 27 and 0.70 to 0.76, except in the sparsest (22 and
0.68). So wider is a little better, and an optimum in between, as we expected, shows for 512 and 1,024. A dense SAE offers up to five times as many
candidates, of which the best are no better. The differences of two or three tasks are small: executors are not made by one choice of dictionary.
"""

# %% [markdown]
r"""
## Taken away instead of added

In many-shot prompts the model knows the task without help. Now $-s\,W_{dec}[f]/|W_{dec}[f]|$ goes to all arrows, and we look at the
fraction of arrows that are followed by the right token. If an executor were all there is, its own task should fall most. The paper
found this test far less specific than adding.
"""

# %%
distinct = np.unique(executors)
tried = jnp.asarray(np.append(distinct, distinct[0]))
scales = jnp.asarray(np.append(np.full(len(distinct), chosen), 0.0), jnp.float32)  # the last one adds nothing
_, accuracy = negative_steering(lm, sae_executor, prompts("evaluation", n_shots, 3, n=4), layer_executor, tried, scales)
accuracy = np.asarray(accuracy).mean(axis=-1)
lost = accuracy[:, -1:] - accuracy[:, :-1]
rows = np.argsort(np.searchsorted(distinct, executors), kind="stable")
fig, ax = plt.subplots(figsize=(8, 5.4), layout="constrained")
heatmap(
    ax, lost[rows], [names[i] for i in rows], [str(i) for i in distinct], colour_label="accuracy lost (fraction of arrows)", signed=True
)
ax.set(xlabel=f"executor of layer {layer_executor} taken away at all arrows")
plt.show()

# %% tags=["nbval-check-output"]
own = np.zeros(lost.shape, bool)
own[np.arange(n_tasks), np.searchsorted(distinct, executors)] = True
print(
    f"accuracy lost: {lost[own].mean():.2f} of {accuracy[:, -1].mean():.2f} by a task's own executor, {lost[~own].mean():.2f} by those of others"
)

# %% [markdown]
"""
It is far more specific here than in the paper: its own executor costs a task 0.70 of an accuracy of 0.92, another one 0.04. What is
lost outside of the own column is mostly lost to two latents, 450 (English words) and 1020 (opposites): without them gerunds, professions and
currencies suffer too, which have little in common but that their answers are English words.
"""

# %% [markdown]
r"""
## Where executors fire

The share of an executor's activation on each kind of token, in the many-shot prompts of its own task, over all tokens of words:
$\mathrm{mass}_r = \sum_{t: role(t)=r} f(x_t) / \sum_t f(x_t)$. Tasks that share a latent are added up first. The bar is 75 % on arrows;
the paper has 90 %.
"""

# %%
roles = [role.name.lower() for role in Role][1:]
published = {"prompt": 0.0, "input": 3.2, "arrow": 89.8, "output": 6.46, "newline": 0.54}
mass = activation_mass(lm, sae_executor, many_shots, executors)
figures.role_mass(mass.mass[:, 1:], mass.latents.tolist(), roles, published=[published[r] / 100 for r in roles])
plt.show()

# %%
figures.style_table(figures.role_mass_table(mass.mass[:, 1:], roles, published), caption="Activation mass of executors (Table 1)", digits=1)

# %% tags=["nbval-check-output"]
arrow_mass = float(mass.mean[Role.ARROW])
print(f"executors: {100 * arrow_mass:.0f} % of the activation is on arrows ({len(mass.latents)} latents)")

# %% [markdown]
"""
94 % of the activation is on arrows, beside 90 % in the paper, and most executors fire hardly anywhere else. The outliers are 30
(gerunds), which fires as much on outputs, and 1020 (opposites), which also fires on the newline before an input.
"""

# %% [markdown]
r"""
## Detectors: cleaning the vectors of outputs

At the outputs of the examples the model can see *which task was just done*. To find the latents that say so, we average the residual
stream over the last token of every example's output, write that vector as 7 latents by gradient pursuit, and clean it as before. The
place to insert it is the `Y` of a dummy line before the query,

    Follow the pattern:
    X -> Y
    query -> answer

so the vector can only help if something later reads outputs. In the paper the vectors themselves "do not usually work, while the cleaned
ones often do".
"""

# %%
dummy = Template(prefix=prefix, dummy=("X", "Y"))
at_y = lambda pool, offset: cut(lm, prompts(pool, 0, offset, template=dummy), layer_detector, "dummy_output")
fitting, held_out = at_y("optimisation", 4), at_y("evaluation", 5)
outputs = output_vector(lm, prompts("extraction", n_shots, 6), [layer_detector])[:, 0]
options = dict(l1=detector_l1, lr=detector_lr, patience=detector_patience, max_steps=detector_steps)
found = clean(lm, sae_detector, outputs, fitting, **options, init="pursuit", k=7)

# %%
zero = base_nll(lm, held_out)
losses = {"nothing": zero, "output vector": inserted_nll(lm, held_out, outputs), "cleaned": inserted_nll(lm, held_out, found.vector)}
losses = {name: np.asarray(nll).mean(axis=-1) for name, nll in losses.items()}
order = np.argsort(losses["cleaned"])
fig, ax = plt.subplots(figsize=(7.5, 3.2))
for (name, loss), marker in zip(losses.items(), "_so", strict=True):
    ax.plot(loss[order], marker, label=f"{name}: {loss.mean():.2f} nats")
ax.set_xticks(range(n_tasks), [names[i] for i in order], rotation=90, fontsize=7)
ax.set(ylabel="loss of the answer (nats)", title="inserted at the Y of the dummy line")
ax.legend()
plt.show()

# %% tags=["nbval-check-output"]
helped = (losses["cleaned"] < losses["nothing"]).sum()
print(f"L0 of the cleaned output vectors {float(found.l0.mean()):.1f}; they help on {helped} of {n_tasks} tasks")

# %% [markdown]
"""
The cleaned vectors, three latents each, beat the raw ones: 0.56 against 0.65 nats, from 1.41 with nothing inserted. Unlike in the paper the raw
vector of outputs works too. In a model of six layers it is close to what a real output would have left there.
"""

# %% [markdown]
"""
## Which detector stands for which task

As for executors: every surviving latent alone, at `Y`, at one length chosen on the optimisation pairs; the detector of a task is the best
of them there, and the figure shows other pairs.
"""

# %%
detector_candidates = np.flatnonzero(np.asarray(found.f > 0).any(axis=0))
alive_d = active_latents(sae_detector, many_shots)
spare = int(alive_d.sum() - alive_d[detector_candidates].sum())
others_d = random_latents(alive_d, min(50, spare), detector_candidates, key=keys["detectors"])
norm_d, lengths_d, best_d, high_d = sweep(sae_detector, fitting, detector_candidates, others_d[:20], (0.5, 1.0, 1.5, 2.0))
chosen_d = scale_detector if scale_detector > 0 else clearest(lengths_d, best_d, high_d)

# %%
effect_d = decrease(sae_detector, held_out, detector_candidates, chosen_d)
figures.task_latent_heatmap(effect_d, names, detector_candidates, n_latents=30, what=f"latent of layer {layer_detector}, the 30 strongest")
plt.show()

# %% [markdown]
"""
Columns are now more widely shared than executors were, and the sharing follows the *output*: 423 serves all tasks that answer with a
language, 51 those that answer in Spanish, 741 those that answer in French, and 815 many that answer with an English word. A detector seems to say "a word of this kind came
after an arrow", not which way led there.

The control as before, with 50 random latents.
"""

# %%
detectors = detector_candidates[decrease(sae_detector, fitting, detector_candidates, chosen_d).argmax(axis=1)]
own_effect_d = effect_d[np.arange(n_tasks), np.searchsorted(detector_candidates, detectors)]
control_d = decrease(sae_detector, held_out, others_d, chosen_d)
figures.latent_control(own_effect_d, control_d, names)
plt.show()

# %% tags=["nbval-check-output"]
passes_d = (own_effect_d >= 0.2) & (own_effect_d > np.percentile(control_d, 95, axis=1))
print(
    f"{passes_d.sum()} of {n_tasks} tasks have a detector ({len(set(detectors.tolist()))} latents), mean decrease {own_effect_d.mean():.2f}"
)
print(f"scale {chosen_d / norm_d:.2g} x the norm of the residual stream at Y")

# %% [markdown]
"""
25 have one; the two sequences and the past tense are just below 20 %. The optimum of the sweep is its largest length, twice the norm: it lies one layer and one attention step
away from the answer, where too long a vector does less harm than at the arrow itself. Random latents do nothing here, whose 95th
percentile stays below 0.2.

Next, where the detectors fire. The bar is 80 % of the activation on outputs; the paper has 97 %.
"""

# %%
published_d = {"prompt": 0.0, "input": 3.22, "arrow": 0.0, "output": 96.76, "newline": 0.01}
mass_d = activation_mass(lm, sae_detector, many_shots, detectors)
figures.role_mass(mass_d.mass[:, 1:], mass_d.latents.tolist(), roles, published=[published_d[r] / 100 for r in roles])
plt.show()

# %%
figures.style_table(
    figures.role_mass_table(mass_d.mass[:, 1:], roles, published_d), caption="Activation mass of detectors (Table 2)", digits=1
)

# %% tags=["nbval-check-output"]
output_mass = float(mass_d.mean[Role.OUTPUT])
print(f"detectors: {100 * output_mass:.0f} % of the activation is on outputs ({len(mass_d.latents)} latents)")

# %% [markdown]
"""
99.8 %: detectors are cleaner than executors, in the paper as well.
"""

# %% [markdown]
"""
## The same latents in plain text

A name for a latent should hold outside of prompts. We take text without any prompt and look for the places where a latent fires most.
The expectation from the paper: an executor fires on the token *before* a task is completed, a detector on the token that
*completes* it.
"""


# %%
def text_rows(n):
    """Rows of text without prompts; for other models than icl-tiny, rows of prompts."""
    if card != "tiny":
        return np.concatenate([p for p in np.asarray(prompts("evaluation", n_shots, 7).tokens)])
    first = tokenizer("Follow", add_special_tokens=False)["input_ids"][0]
    rows = held_out_corpus(lm, n)
    return rows[rows[:, 1] != first]


def show_examples(sae, latent, title, text, k=4):
    """The k rows of text in which a latent fires most."""
    examples = top_examples(lm, sae, text, [int(latent)], k=k)
    words = [[tokenizer.decode([int(t)]) for t in row] for row in examples.tokens[0]]
    figures.examples_figure(words, list(examples.activation[0]), title=title)
    plt.show()


text = text_rows(1000)
strongest = int(np.argmax(np.where(passes & passes_d, own_effect + own_effect_d, -1)))
second = names.index("antonyms") if "antonyms" in names else int(np.argsort(-own_effect)[1])

# %%
show_examples(sae_executor, executors[strongest], f"executor {executors[strongest]} of {names[strongest]}, layer {layer_executor}", text)

# %% [markdown]
"""
Now the detector of the same task.
"""

# %%
show_examples(sae_detector, detectors[strongest], f"detector {detectors[strongest]} of {names[strongest]}, layer {layer_detector}", text)

# %% [markdown]
"""
And the same two for opposites, the paper's example.
"""

# %%
show_examples(sae_executor, executors[second], f"executor {executors[second]} of {names[second]}, layer {layer_executor}", text)

# %%
show_examples(sae_detector, detectors[second], f"detector {detectors[second]} of {names[second]}, layer {layer_detector}", text)

# %% [markdown]
"""
To compare: how high do they go in text, and how high in the prompts of their own task?
"""


# %% tags=["nbval-check-output"]
def peaks(sae, latents, rows):
    """Largest activation (latent,) on any of the rows."""
    return top_examples(lm, sae, rows, latents, k=1).peak[:, 0]


in_prompts = np.asarray(many_shots.tokens).reshape(-1, many_shots.tokens.shape[-1])
for what, sae, latents in (("executors", sae_executor, np.unique(executors)), ("detectors", sae_detector, np.unique(detectors))):
    print(f"{what}: peak in text / peak in prompts, median {np.median(peaks(sae, latents, text) / peaks(sae, latents, in_prompts)):.2f}")

# %% [markdown]
"""
The executors hold outside of prompts, and at nearly the strength they have there (0.97). The one of continents fires on "in" of "is a
city in Europe", before the answer, and that of opposites on "and" of "rude and polite" and "but" of "not rude but polite". Detectors carry over
less (0.29). The one of continents fires on "Europe", as it should. The one of opposites, which many tasks share, fires weakly on
"spider" in lists of nouns, which completes nothing. The text of this language is a few fixed sentences, so a detector of prompts need not mean anything in it.
"""

# %% [markdown]
r"""
## From detector to executor

If executors hang on detectors, pushing a detector down on the output tokens should silence the executor of the same task and leave others
alone. As in the paper, we subtract a multiple of the detector's mean activation along its direction,
$x' = x - s\,\bar a_d\,W_{dec,d}/|W_{dec,d}|$, on the output tokens, run the blocks up to the executors' layer with attention patterns
frozen at the clean ones, and measure which share of each executor's activation at the arrows is gone. $\bar a_d$ is a mean over *all*
tokens; a detector fires on one in four or five, so $s = 10$ pushes about twice its own activation away. (The paper has $s = 50$.)

For the figure each task is divided by its largest effect and the tasks with an effect are averaged. Cells of a detector and an
executor of the same task are outlined. The bar: they average at least three times the others.
"""

# %%
rows_d, columns_e = np.unique(detectors), np.unique(executors)
same = np.zeros((len(rows_d), len(columns_e)), bool)
same[np.searchsorted(rows_d, detectors), np.searchsorted(columns_e, executors)] = True
shown = prompts("evaluation", n_shots, 3, n=6)
strengths = (2.0, 5.0, 10.0, 20.0, 50.0)
links = detector_executor(lm, sae_detector, sae_executor, shown, rows_d, columns_e, strengths=strengths)
strength = display_strength(links.effect[strengths.index(10.0)])


# %%
def of_tasks(latents, which):
    """Labels: the latent, the first task it serves, and how many more there are."""
    served = [[n for n, d in zip(names, which, strict=True) if d == latent] for latent in latents]
    return [f"{i} {n[0]}{f' +{len(n) - 1}' if len(n) > 1 else ''}" for i, n in zip(latents, served, strict=True)]


fig, ax = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
figures.link_heatmap(strength, of_tasks(rows_d, detectors), of_tasks(columns_e, executors), same_task=same, ax=ax)
ax.set(ylabel="detector pushed down")
plt.show()

# %% [markdown]
"""
The same comparison at other strengths, by ablation (the detector's own contribution $f_d(x) W_{dec,d}$ taken out, no more), and
for random latents of the detectors' layer in the place of detectors. The column *undivided* is the plain share of a task's own executor that
goes with its own detector. In the last column effects below 0.1 count as none, which is near the paper's rule (it drops pairs whose
largest effect at any arrow is below 0.1).
"""

# %%
ablated = detector_executor(lm, sae_detector, sae_executor, shown, rows_d, columns_e, mode="ablate")
extra = random_latents(alive_d, min(12, spare), detector_candidates, key=keys["links"])
random_links = detector_executor(lm, sae_detector, sae_executor, shown, extra, columns_e, strengths=(10.0,))
at = (np.arange(n_tasks), np.searchsorted(rows_d, detectors), np.searchsorted(columns_e, executors))
table = []
for name, effects in [(f"steered, s = {s:g}", e) for s, e in zip(strengths, links.effect, strict=True)] + [("ablated", ablated.effect[0])]:
    shares = display_strength(effects)
    table.append(
        {
            "detectors": name,
            "same task": shares[same].mean(),
            "other pairs": shares[~same].mean(),
            "own, undivided": np.nan_to_num(effects[at]).mean(),
            "ratio, above 0.1": np.divide(
                *(display_strength(np.where(effects < 0.1, 0, effects))[cells].mean() for cells in (same, ~same))
            ),
        }
    )
random_own = np.nan_to_num(random_links.effect[0][np.arange(n_tasks), :, at[2]]).mean()
table = pd.DataFrame([*table, {"detectors": "random latents, s = 10", "own, undivided": random_own}])
table["ratio"] = table["same task"] / table["other pairs"]
figures.style_table(table.set_index("detectors"), caption="What a detector takes from executors")

# %% tags=["nbval-check-output"]
diagonal, rest = float(strength[same].mean()), float(strength[~same].mean())
own_link = float(table["own, undivided"][strengths.index(10.0)])
print(f"detector to executor: same task {diagonal:.2f}, other pairs {rest:.2f}, ratio {diagonal / rest:.1f}")
print(f"of a task's own executor {100 * own_link:.0f} % goes with its detector, {100 * random_own:.0f} % with a random latent")

# %% [markdown]
"""
Same-task pairs stand out at every strength, by 4.5 to 1 at $s = 10$ and by 4.2 to 1 at the paper's $s = 50$, where 53 % of a task's own
executor goes with its own detector; random latents take nothing. Three things weaken the picture. Ablation, the smallest intervention, takes
only 2 % of the executor: one detector is one of several latents that tell the kind of an output, and the arrow reads many outputs. The
brightest cell of the figure is no pair of one task: dividing by each task's largest effect makes a weak effect in a single task look
large. And if effects below 0.1 are left out, the averages run over fewer tasks, and the ratio falls from 4.2 at $s = 10$ to 2.4 at $s = 50$.
"""

# %% [markdown]
"""
The numbers for the ledger, each with its criterion. On the embedded model they are claims; on others only the verdict is recorded.
"""

# %%
store.save(
    "executors",
    {"executors": executors, "detectors": detectors, "effect": own_effect, "effect_detector": own_effect_d, "links": strength},
    meta={"model": model, "tasks": names, "layers": [layer_executor, layer_detector], "scales": [chosen, chosen_d]},
)
enough = max(18, 0.78 * n_tasks)
ledger.record(
    "executors",
    item="Fig 5",
    published="22 of 23",
    ours=f"{passes.sum()} of {n_tasks}",
    unit="tasks",
    criterion="one latent cuts the loss by 20 % and beats 95 % of random ones on 18 tasks and 78 % of them",
    holds=passes.sum() >= enough,
)
ledger.record(
    "best_executor",
    item="App F",
    published=0.867,
    ours=float(own_effect.max()),
    unit="relative loss decrease",
    criterion="at least 0.5",
    holds=own_effect.max() >= 0.5,
)
ledger.record(
    "negative_steering",
    item="App F.1",
    published=None,
    ours=[float(lost[own].mean()), float(lost[~own].mean())],
    unit="accuracy lost: own, others",
    criterion="own more than others",
    holds=lost[own].mean() > lost[~own].mean(),
)
ledger.record(
    "executor_mass",
    item="Table 1",
    published=89.8,
    ours=100 * arrow_mass,
    unit="% on arrows",
    criterion="at least 75 %",
    holds=arrow_mass >= 0.75,
)
ledger.record(
    "detector_mass",
    item="Table 2",
    published=96.76,
    ours=100 * output_mass,
    unit="% on outputs",
    criterion="at least 80 %",
    holds=output_mass >= 0.8,
)
ledger.record(
    "cleaned_detectors",
    item="App G",
    published=None,
    ours=[float(loss.mean()) for loss in losses.values()],
    unit="nats: nothing, raw, cleaned",
    criterion="cleaned below raw and nothing",
    holds=losses["cleaned"].mean() < min(losses["nothing"].mean(), losses["output vector"].mean()),
)
ledger.record(
    "detectors",
    item="Fig 7",
    published=None,
    ours=f"{passes_d.sum()} of {n_tasks}",
    unit="tasks",
    criterion="as for executors",
    holds=passes_d.sum() >= enough,
)
ledger.record(
    "links",
    item="Fig 8",
    published=[0.71, 0.147],
    ours=[diagonal, rest],
    unit="same task, others",
    criterion="same task at least 3 x others",
    holds=diagonal >= 3 * rest,
)

# %%
ledger.write()
failed = [entry["key"] for entry in ledger.entries.values() if not entry["holds"]]
assert card != "tiny" or not failed, f"claims that do not hold on the embedded model: {failed}"
ledger.table()[["item", "key", "published", "ours", "criterion", "holds"]]

# %% [markdown]
"""
## What we saw

- 24 of 28 tasks of the embedded model have an executor: one latent at the arrow that alone removes 33 to 98 % of the loss, on pairs that
  were not used to find it, where 95 of 100 random latents remove less. Taken away, it costs its own task 0.70 of accuracy, other tasks 0.04.
- SAEs of other widths and sparsities have executors for 21 to 27 tasks; only one of twelve falls short of the bar.
- Executors are active on arrows (94 % of their activation) and in plain text before the word that completes the relation.
- Detectors are active on outputs (99.8 %). Alone, at a dummy output, thirteen of them set 25 of 28 tasks.
- Pushing a task's detector down on the outputs takes more from its own executor than from others, 4.5 to 1 (published: 0.71 to 0.15, 4.8 to 1).

## Limits

- One model, one SAE suite, one layer for each kind. The detectors' scale is at the end of its sweep.
- The sequences have no executor: none of the latents that cleaning leaves does much alone.
- Executors and detectors are shared within families, so "a task's own" is often a family's own, and same-task cells are not independent.
- The ratio of the link figure depends on how small effects are averaged (the table above), its being above one does not. Taking one
  detector away, as it is, leaves nearly all of the executor.

## Next
Executors and detectors are two points of a circuit. Notebook 05 looks for all of it: the latents of residual stream, attention and MLPs
that a task cannot do without.
"""
