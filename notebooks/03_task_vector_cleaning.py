# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A handful of latents does the work of a task vector

**Claim.** Task vector cleaning (TVC) finds, among the latents of an encoded task vector, the few that make the model do the task.
They do it better than the vector, and better than as many latents chosen for reconstruction.

- You will see Algorithm 1 at work, its sweep over the sparsity penalty, its Pareto front against inference-time optimisation (ITO), the
  comparison at equal L0 task by task, all layers beside the methods of the last notebook, how stable the surviving latents are, and what
  changes with the width and sparsity of the dictionary.
- You need a CPU, two minutes, the vectors that `02_task_vectors` saved, and the SAEs that `01_sparse_autoencoders` trained. Source: "Scaling Sparse Feature Circuits For Studying
  In-Context Learning" (ICL-SFC), Sec. 3.1, Algorithm 1, Figs. 3a and 3b, App. D.

All numbers below are about the embedded model, a transformer of six layers and 1.6 M parameters. They show the method at work; they
are not the paper's results.
"""

# %%
import dataclasses

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from icl_lib import embedded, figures
from icl_lib.cards.notebook import open_run
from icl_lib.figures.style import plain_log
from icl_lib.models import Site, load_model, load_tokenizer, mesh_of
from icl_lib.runs import compute_dtype
from icl_lib.saes import load_sae, load_suite
from icl_lib.tasks import Template, load_tasks, make_prompts, stack_prompts
from icl_lib.vectors import base_nll, clean, cut, inserted_nll, pursuit_path, select_l1

# %% tags=["parameters"]
card: str = "tiny"  # name of the experiment card
model: str = "icl-tiny"  # name of an embedded model, hub id or folder of the model
saes: list[str] = ["icl-tiny"]  # name or folder of the SAE suite, or folders and hub paths with {layer} in them
sae_layers: list[int] = [0, 1, 2, 3, 4, 5]  # layers whose SAEs are loaded, counted as their files do
sae_variant: str = ""  # "paper" reads the ICL-SFC authors' SAEs as in their experiments; empty: as trained
tasks: str = "embedded"  # embedded, paper, function_vectors, or a folder of task files
prefix: str = "Follow the pattern:\n"  # opens a prompt; chat models may want a turn opened
run_dir: str = "runs/tiny"  # where results go, from the repository root
seed: int = 0  # seed of prompts, corpora, training and random draws
n_prompts: int = 16  # prompts per task
layer_executor: int = 4  # layer (resid_pre) whose latents are looked for at the arrow
tvc_l1: list[float] = [0.0003, 0.001, 0.003, 0.01, 0.03]  # L1 penalties swept, nats per unit of activation
tvc_lr: float = 10.0  # learning rate of Adam, in units of activation per step
tvc_patience: int = 50  # steps without a smaller L0 before it stops
tvc_steps: int = 150  # most steps
tvc_prompts: int = 12  # prompts per task on which a vector is cleaned
sweep_widths: list[int] = [256, 512, 1024]  # widths of SAEs trained in 01, tried in 03 and 04; [] trains none

# %%
store, ledger = open_run("03_task_vector_cleaning", globals())
lm = load_model(model, dtype=compute_dtype(), mesh="auto")
tokenizer = load_tokenizer(model)
suite = load_suite(saes, lm.config, sae_layers, variant=sae_variant or None, sites=["resid_pre"], mesh=mesh_of(lm))
suite = {site: sae.fold() for site, sae in suite.items()}
task_set, template = load_tasks(tasks), Template(prefix=prefix)
names = list(task_set)
saved, meta = store.load("task_vectors", expect={"tasks": names})
vectors, best = jnp.asarray(saved["vectors"]), meta["best_layer"]

# %% [markdown]
r"""
## The algorithm

The pre-activations $\theta$ of the SAE at the task vector are optimised by Adam, so that the decoded vector, added at the arrow of
zero-shot prompts, makes the model answer, with as little activation as possible:

$$\min_\theta\; \mathrm{NLL}(v_\theta) + \lambda \sum_i f_i, \qquad f = \mathrm{act}(\theta), \qquad v_\theta = f W_{dec} + b_{dec}.$$

Three things to know. A latent that is off gets no gradient, so the support only shrinks: TVC selects and re-weights. It stops when L0
has not fallen for `tvc_patience` steps, and returns the last iterate. And $b_{dec}$ is always inserted.
"""

# %%
figures.cleaning_overview()
plt.show()

# %% [markdown]
r"""
The optimisation sees two thirds of the pairs of the optimisation pool. The last third is for choices ($\lambda$, learning rate), and the
evaluation pool for what we report.
"""


# %%
def prompts(pool, offset, n=n_prompts):
    """Zero-shot prompts of every task, stacked; `pool(task)` gives the pairs."""
    options = dict(n_prompts=n, n_shots=0, seed=seed + offset, template=template)
    return stack_prompts([make_prompts(task, tokenizer, pool=pool(task), **options) for task in task_set.values()])


fitting = prompts(
    lambda task: [pair for i, pair in enumerate(task.pool("optimisation")) if i % 3], offset=3, n=tvc_prompts
)
choosing = prompts(lambda task: task.pool("optimisation")[::3], offset=4)
held_out = prompts(lambda task: task.pool("evaluation"), offset=5)

# %% [markdown]
r"""
## The scale of things

The paper's learning rate 0.15 and penalties around $10^{-3}$ were for Gemma's activations. What they mean depends on the size of a
latent: with $\bar f$ the mean activation of the active latents, $\lambda \bar f$ is the price of one latent in nats, and
$\bar f / \mathrm{lr}$ is how many steps it takes Adam, whose steps are about lr long, to switch one off. The price should be
small beside the loss of about 1.3 nats and the stop should come later than the last switch.
"""

# %% tags=["nbval-check-output"]
sae, vector = suite[Site("resid_pre", best)], vectors[:, best]
f_start = np.asarray(sae.encode(vector))
encoded_l0 = (f_start > 0).sum(axis=-1)
typical = f_start.sum() / max(1, encoded_l0.sum())
no_latents = encoded_l0 == 0  # such a vector is the bias alone: fractions of its L0 are NaN
if no_latents.any():
    print("no latent encodes the vectors of", ", ".join(np.array(names)[no_latents]))
per_latent = lambda counts: (np.asarray(counts).T / np.where(no_latents, np.nan, encoded_l0)).T
print(f"layer {best}: {encoded_l0.mean():.1f} latents encode a task vector, with a mean activation of {typical:.1f}")
print("price of one latent: " + ", ".join(f"{value * typical:.2g}" for value in tvc_l1) + " nats")
print(f"steps to switch one off: {typical / tvc_lr:.0f}, patience {tvc_patience}")

# %% [markdown]
r"""
## Cleaning at the best layer

All tasks and all $\lambda$ are optimised in one compiled call. We expect the loss to fall and L0 with it: first because what only
served the reconstruction goes, later because the penalty pays for less loss.
"""

# %%
fit_cut, choose_cut, test_cut = (cut(lm, p, best) for p in (fitting, choosing, held_out))
options = dict(lr=tvc_lr, patience=tvc_patience, max_steps=tvc_steps)
cleaned = clean(lm, sae, vector, fit_cut, l1=tvc_l1, **options)
loss = lambda where, v: np.asarray(inserted_nll(lm, where, v).mean(axis=-1))
tv_choose, tv_test = loss(choose_cut, vector), loss(test_cut, vector)
tvc_choose, tvc_test = loss(choose_cut, cleaned.vector), loss(test_cut, cleaned.vector)

# %%
fig, panels = plt.subplots(1, 2, figsize=(7.2, 2.8))
for ax, curve, label in (
    (panels[0], cleaned.nll_curve, "NLL of fitting prompts (nats)"),
    (panels[1], cleaned.l0_curve, "active latents (L0)"),
):
    kept = pd.DataFrame(np.asarray(curve).reshape(-1, curve.shape[-1])).ffill(axis=1).to_numpy().reshape(curve.shape)
    for i, value in enumerate(tvc_l1):
        ax.plot(kept[:, i].mean(axis=0), label=f"λ = {value:g}", linewidth=1.2)
    ax.set(xlabel="step", ylabel=label, ylim=(0, None))
panels[0].set_title("mean over tasks; a stopped task keeps its value")
panels[1].legend()
plt.show()

# %% [markdown]
"""
More than half of the latents go in the first 20 steps. The first steps overshoot, since a latent needs but one to be switched off; then the loss
settles, below that of the start for the two smallest penalties: what went was not needed. The larger ones buy their last latents with loss.
"""

# %% [markdown]
r"""
## The sweep over the penalty

On the pairs kept for choices, against $\lambda$: the relative decrease of the loss, and L0 as a fraction of the encoding's. The paper
finds a plateau, then a collapse where the penalty outweighs the loss.
"""

# %%
zero_choose, zero_test = (np.asarray(base_nll(lm, where).mean(axis=-1)) for where in (choose_cut, test_cut))
if no_loss := [name for name, *zero in zip(names, zero_choose, zero_test, strict=True) if not min(zero) > 0]:
    print("no loss with nothing inserted, so that no relative change of it is known:", ", ".join(no_loss))
# of losses (task, ...) and those with nothing inserted (task,); NaN where these are 0
relative = lambda loss, zero: (loss.T / np.where(zero > 0, zero, np.nan) - 1).T
fraction = per_latent(cleaned.l0)
figures.sweep_panels(
    tvc_l1, -relative(tvc_choose, zero_choose), fraction, reference=-relative(tv_choose, zero_choose).mean()
)
plt.show()

# %% [markdown]
r"""
Up to $\lambda = 0.001$ there is a plateau above the task vector's dashed line, with a third of the encoding's latents (here a mean over
tasks of fractions); at 0.003 the lead over the task vector is nearly gone, and at 0.03 the penalty outweighs the loss. Tasks differ much (the shaded
band), so a penalty that is too large for one may spare latents in another. Prices are relative to activations
(0.015 nats a latent at $\lambda = 0.003$), so a good $\lambda$ need not carry over to another SAE.

## The choice of the penalty

Both rules are read on the pairs kept for choices. **TVC** from here on: for each task the fewest latents whose loss is at most 1.02 times the
task vector's, so that only what the vector did has to be kept. **TVC, one λ**: the same rule for the means over tasks, one penalty for all. It is
what a user has who sets $\lambda$ once, and what we use below where a whole sweep would take too long. All losses are on the evaluation pool.

The learning rate was chosen on the pairs kept for choices as well, among 5, 10 and 20: at 10 fewer latents were left than at 5 for nearly the same
loss, and at 20 the loss was far higher. It is large because activations are: see the steps that it takes to switch a latent off, above.
"""

# %% tags=["nbval-check-output"]
of = lambda table, index: np.take_along_axis(np.asarray(table), np.asarray(index)[:, None], axis=1)[:, 0]
rule = lambda **kind: select_l1(cleaned.l0, jnp.asarray(tvc_choose), jnp.asarray(tv_choose), **kind)
picks = {"TVC": rule(), "TVC, one λ": rule(shared=True)}
shared_l1 = tvc_l1[int(picks["TVC, one λ"][0])]
l0s = {"SAE encoding": encoded_l0} | {name: of(cleaned.l0, index) for name, index in picks.items()}
change = {"task vector": relative(tv_test, zero_test)} | {
    name: relative(of(tvc_test, index), zero_test) for name, index in picks.items()
}
final, l0 = cleaned.take(picks["TVC"]), l0s["TVC"]
print(
    "penalties chosen: "
    + ", ".join(
        f"{n} tasks {value:g}"
        for value, n in zip(tvc_l1, np.bincount(picks["TVC"], minlength=len(tvc_l1)), strict=True)
    )
)
print(f"one λ for all: {shared_l1:g}")
for name in picks:
    print(
        f"{name:10s} L0 {l0s[name].mean():4.1f} of {encoded_l0.mean():.1f}; relative loss change {change[name].mean():+.2f}"
    )
print(f"task vector: relative loss change {change['task vector'].mean():+.2f}")

# %%
figures.l0_bars(l0s, published={"SAE encoding": 10.87, "TVC": 3.78})
plt.show()

# %% [markdown]
"""
The dashed levels are for Gemma-1 2B at layer 12; the shape is the same. Of 8.3 encoded latents TVC leaves 1.9, less than a quarter, with a loss
change of -84 % against the task vector's -79 %. With one penalty for all tasks it is 2.6 latents and -87 %: a penalty that is small enough for
the task that needs most latents leaves others with more than they need.
"""

# %% [markdown]
"""
## Against inference-time optimisation

ITO spends its latents on the vector's direction, TVC on its effect. One run of gradient pursuit gives its codes with 1, 2, 3, ... latents.
Below is every task at every setting: to the left is sparser, above 0 is better than the task vector. A point of ITO has the number of
latents it really uses, which may be fewer than its number of steps.
"""

# %%
n_steps = 24
codes = pursuit_path(vector, sae.W_dec, n_steps)
ito_l0 = np.asarray((codes > 0).sum(axis=-1)).T
ito_test = loss(test_cut, jnp.moveaxis(codes @ sae.W_dec, 0, 1))
gain = lambda values: (tv_test[:, None] - values) / np.where(zero_test > 0, zero_test, np.nan)[:, None]
ito_points = (per_latent(ito_l0).ravel(), gain(ito_test).ravel())
figures.sweep_scatter({"ITO": ito_points, "TVC": (fraction.ravel(), gain(tvc_test).ravel())})
plt.show()

# %%
settings = {
    "ITO": (ito_l0.mean(axis=0), relative(ito_test, zero_test).mean(axis=0)),
    "TVC": (np.asarray(cleaned.l0).mean(axis=0), relative(tvc_test, zero_test).mean(axis=0)),
}
ax = figures.pareto_front(settings, ylabel="relative change of loss, mean over tasks")
ax.axhline(change["task vector"].mean(), color="black", linestyle="--", linewidth=1)
plt.show()

# %% [markdown]
"""
From two latents on TVC reaches losses that ITO reaches with no number of latents. With fewer, ITO is ahead: its first latent alone gives
-77 %, and more of them bring it to the task vector, whose direction it approximates, and no further. Here one penalty serves all tasks at each point of TVC.
"""

# %% [markdown]
r"""
## At equal L0, task by task

For each task, ITO gets as many latents as TVC left (a task with none left has only the bias, and ITO one latent): of its codes the last one that
uses no more. One difference is not about latents: TVC inserts $b_{dec}$, ITO as published does not. So we also give ITO the bias: its pursuit
then explains $v - b_{dec}$, and the bias is added back.
"""


# %%
def ito_at(codes, bias, l0):
    """Relative loss change (task,) of codes (step, task, d_sae), for each task the last that has at most `l0` latents."""
    used = np.asarray((codes > 0).sum(axis=-1)).T <= np.maximum(l0, 1)[:, None]
    last = used.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
    return relative(loss(test_cut, codes[last, np.arange(len(names))] @ sae.W_dec + bias), zero_test)


codes_with_bias = pursuit_path(vector - sae.b_dec[None], sae.W_dec, n_steps)
ito_equal, ito_bias_equal = ito_at(codes, 0.0, l0), ito_at(codes_with_bias, sae.b_dec[None], l0)
figures.equal_l0(ito_equal, change["TVC"], names, l0)
plt.show()

# %% tags=["nbval-check-output"]
wins, wins_bias = change["TVC"] < ito_equal, change["TVC"] < ito_bias_equal
one = "TVC, one λ"
wins_one = change[one] < ito_at(codes, 0.0, l0s[one])
print(f"at equal L0 TVC beats ITO on {wins.sum()} of {len(names)} tasks, and ITO with the bias on {wins_bias.sum()}")
print(f"with one λ TVC beats ITO at equal L0 on {wins_one.sum()}")
print(
    f"mean change: TVC {change['TVC'].mean():+.2f}, ITO {ito_equal.mean():+.2f}, ITO with the bias {ito_bias_equal.mean():+.2f}"
)
print(f"not better than ITO on: {', '.join(np.array(names)[~wins]) or 'none'}")

# %% [markdown]
"""
TVC is ahead on 25 of 28 tasks, with a penalty for each or one for all. With the bias ITO does better, -81 % on average against TVC's -84 %, and TVC is
ahead on 16 only: much of its advantage over ITO as published is the bias that it inserts. For `next_item` cleaning left nothing but the bias.
"""

# %% [markdown]
r"""
## All layers

Fig. 3a of the paper has five methods; the last notebook drew four. At every layer from 2 on TVC now runs its sweep, and the penalty is chosen
for each task by the rule above. Layers 0 and 1 are left out: no vector works there.
"""


# %%
def cleaned_at(layer):
    """Cleaned vectors of one layer, and their relative loss change (task,) on the evaluation pool."""
    sae, v = suite[Site("resid_pre", layer)], vectors[:, layer]
    fit, choose, test = (cut(lm, p, layer) for p in (fitting, choosing, held_out))
    swept = clean(lm, sae, v, fit, l1=tvc_l1, **options)
    result = swept.take(select_l1(swept.l0, jnp.asarray(loss(choose, swept.vector)), jnp.asarray(loss(choose, v))))
    return result, relative(loss(test, result.vector), zero_test)


layers = [i for i in range(2, lm.config.n_layers) if Site("resid_pre", i) in suite]
by_layer = {i: (final, change["TVC"]) if i == best else cleaned_at(i) for i in layers}

# %%
curves = {"TVC": np.stack([by_layer[i][1] for i in layers], axis=1)}
curves |= {method: saved["change"][j][:, layers] for j, method in enumerate(meta["methods"])}
figures.layer_curves(layers, curves, mark=best)
plt.show()

# %% tags=["nbval-check-output"]
for i in layers:
    before, after = saved["encoded_l0"][:, i].mean(), np.asarray(by_layer[i][0].l0).mean()
    print(f"layer {i}: L0 {before:5.1f} to {after:4.1f}; relative loss change {by_layer[i][1].mean():+.2f}")

# %% [markdown]
"""
At every layer cleaning is better than the vector it started from, by little at the last. At layer 3, the elbow, it gains most:
-86 % from a vector of -66 %, better than any vector of any layer, so the latents are there a layer earlier than the vector works best. At layer 2
it does not make a vector that works; it takes the harm away.
"""

# %% [markdown]
r"""
## How stable is the result?

The paper's supports differ between runs. Here the cleaning with one $\lambda$ is repeated with other prompts, and with learning rates three times smaller
and larger. The overlap is the mean over tasks of the shared share of surviving latents (intersection over union; two empty sets overlap fully).
"""


# %%
def overlap(f, g):
    """Mean intersection over union of the supports of two sets of codes (task, d_sae)."""
    f, g = np.asarray(f) > 0, np.asarray(g) > 0
    union = (f | g).sum(axis=-1)
    return float(np.where(union > 0, (f & g).sum(axis=-1) / np.maximum(union, 1), 1.0).mean())


again = cut(
    lm, prompts(lambda task: [pair for i, pair in enumerate(task.pool("optimisation")) if i % 3], offset=6), best
)
runs = {"other prompts": (again, tvc_lr), "lr / 3": (fit_cut, tvc_lr / 3), "lr x 3": (fit_cut, tvc_lr * 3)}
results = {"as above": cleaned.take(picks["TVC, one λ"])} | {
    name: clean(lm, sae, vector, where, l1=shared_l1, **(options | {"lr": lr})) for name, (where, lr) in runs.items()
}
rows = [
    {"run": name, "L0": float(r.l0.mean()), "loss change": relative(loss(test_cut, r.vector), zero_test).mean(),
     "steps": float(r.steps.mean()), "overlap": overlap(r.f, results["as above"].f)}
    for name, r in results.items()
]  # fmt: skip
stability = pd.DataFrame(rows)
figures.style_table(stability, caption=f"λ = {shared_l1:g} at layer {best}", digits={"L0": 1, "steps": 0})

# %% [markdown]
"""
The effect depends neither on prompts nor on a smaller rate (-87 to -88 %). Of these supports four fifths are shared (overlap 0.83): as in
the paper, the surviving set is one of several that do. Three times the rate is too much: it leaves 1.5 latents and costs effect (-77 %).
"""

# %% [markdown]
r"""
## Does it depend on the dictionary?

The paper's reviewers asked what a wider or a sparser SAE would change. Notebook 01 trained SAEs of several widths with several penalties at
`layer_executor`. Each gets the vectors, the prompts and the one $\lambda$ from above: a latent is in units of the vector that it writes in all of
them, so its price is the same. The learning rate is half of the SAE's own $\bar f$, so that a latent takes two steps to switch off everywhere: dense SAEs
have many small latents, which the rate of above would jump over all at once. The authors answered that cleaning works for all SAEs that they tried, of L0 20 to
300, and that "very high L0s seem to produce lower L0 task vectors". We expect fewer latents after cleaning than in the encoding everywhere, and
little difference in the loss.
"""

# %%
fit_here, test_here = (cut(lm, p, layer_executor) for p in (fitting, held_out))
vectors_here = vectors[:, layer_executor]
change_here = relative(loss(test_here, vectors_here), zero_test).mean()
dictionaries = store.load_table("sae_sweep") if sweep_widths else pd.DataFrame({"folder": []})


def cleaned_in(folder):
    """Cleaning with another SAE: latents that encode and survive, their numbers and the relative loss changes, means over tasks."""
    sae = dataclasses.replace(
        load_sae(store.run_dir / folder).fold(), metadata=()
    )  # without what differs, one compilation serves a width
    start = sae.encode(vectors_here)
    n_on = (start > 0).sum()
    lr = 0.5 * float(start.sum() / n_on) if n_on else tvc_lr
    result = clean(lm, sae, vectors_here, fit_here, l1=shared_l1, **(options | {"lr": lr}))
    losses = {"change": loss(test_here, result.vector), "reconstruction": loss(test_here, sae.decode(start))}
    counts = {"encoded": float((start > 0).sum(axis=-1).mean()), "left": float(result.l0.mean())}
    return result.f > 0, counts | {name: relative(x, zero_test).mean() for name, x in losses.items()}


survivors, measured = {}, []
for folder in dictionaries["folder"]:
    survivors[folder], row = cleaned_in(folder)
    measured.append(row)
dictionaries = pd.concat([dictionaries, pd.DataFrame(measured)], axis=1)

# %%
if sweep_widths:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figures.width_lines(dictionaries, "encoded", ax=left, style="s--", suffix=", encoding")
    figures.width_lines(dictionaries, "left", ax=left, suffix=", after TVC")
    figures.width_lines(dictionaries, "reconstruction", ax=right, style="s--", legend=False)
    figures.width_lines(dictionaries, "change", ax=right, legend=False)
    right.axhline(change_here, color="black", linestyle=":", linewidth=1, label="task vector")
    left.set_ylabel("latents of a task vector (L0)")
    plain_log(left.yaxis)
    right.set(ylabel="relative change of loss", title="full: TVC, dashed: SAE reconstruction")
    left.legend(fontsize=7)
    right.legend()
    plt.show()

# %%
if sweep_widths:
    part = dictionaries["left"] / dictionaries["encoded"].where(dictionaries["encoded"] > 0)
    print(f"TVC leaves {part.min():.2f} to {part.max():.2f} of the encoding's latents")
    low, high = dictionaries["change"].min(), dictionaries["change"].max()
    print(f"relative loss change after TVC {low:+.2f} to {high:+.2f}, task vector {change_here:+.2f}")
    print(f"better than the task vector in {(dictionaries['change'] < change_here).sum()} of {len(dictionaries)} SAEs")
    for what in ("encoded", "left"):
        print(f"{what}:\n{dictionaries.pivot(index='d_sae', columns='sparsity', values=what).round(1).to_string()}")

# %% [markdown]
"""
These SAEs were trained on the spot, so their digits differ a little from processor to processor. What does not:
"""

# %% tags=["nbval-check-output"]
if sweep_widths:
    n_saes = len(dictionaries)
    print(f"TVC leaves at most 0.7 of the latents in {(part < 0.7).sum()} of {n_saes} SAEs")
    close = dictionaries["change"] < change_here + 0.05
    print(f"its loss is within 0.05 of the task vector's, or lower, in {close.sum()} of {n_saes}")

# %% [markdown]
r"""
Cleaning takes latents away in every one of them: of the 3 to 109 that encode a task vector it leaves 1 to 11. What is left grows slowly with the
SAE's L0, while the encoding grows fast, so dense SAEs gain most latents from cleaning; but at one $\lambda$ their task vectors are not sparser than
those of sparse SAEs (the authors compared at different $\lambda$). The cleaned vector beats the task vector in 11 of the 12, by up to 0.11. The one
exception, 1,024 latents at the largest training penalty, stays 0.01 behind: its encodings have four latents and lose effect already, of which cleaning
wins most back. Where an encoding has two or three latents (256 at the largest penalty) cleaning leaves just over half of them, and our criterion of
half fails there. Width hardly changes what is left; at equal L0 the wider SAEs have the slightly lower loss."""

# %% [markdown]
"""
## Which latents remain?

If many encoded latents only said "arrow", they would be shared by most tasks, and cleaning would remove them. We count, for every latent,
in how many tasks it is encoded and in how many it survives.
"""

# %%
encoded_in, survives_in = (f_start > 0).sum(axis=0), np.asarray(final.f > 0).sum(axis=0)
fig, ax = plt.subplots(figsize=(4.6, 3.0))
bins = np.arange(1, len(names) + 2) - 0.5
ax.hist([encoded_in[encoded_in > 0], survives_in[survives_in > 0]], bins=bins, label=["SAE encoding", "TVC"])
ax.set(
    xlim=(0.4, encoded_in.max() + 0.6),
    xlabel="tasks that have the latent",
    ylabel="latents",
    title=f"layer {best}, {len(names)} tasks",
)
ax.legend()
plt.show()

# %%
show = [
    name for name in ("country_capital", "antonyms", "en_fr", "present_gerund", "person_language") if name in names
] or names[:5]
before = lambda t: f"{encoded_l0[t]} latents"
after = lambda t: ", ".join(
    f"{i} ({f_start[t, i]:.0f} → {final.f[t, i]:.0f})" for i in np.argsort(-np.asarray(final.f[t]))[: l0[t]]
)
rows = [(name, before(names.index(name)), after(names.index(name))) for name in show]
columns = ["task", "encoding", "left: latent (activation before → after)"]
figures.style_table(pd.DataFrame(rows, columns=columns), caption="What cleaning leaves of five task vectors")

# %% tags=["nbval-check-output"]
common = encoded_in >= len(names) / 2
left = (survives_in[common] >= len(names) / 2).sum()
print(f"latents encoded in half of the tasks or more: {common.sum()}, of these left in as many: {left}")
print(f"{(survives_in > 0).sum()} latents survive in some task, {(survives_in == 1).sum()} of them in one only")

# %% [markdown]
"""
No latent is encoded in half of the tasks: what all arrows share seems to sit in the bias. Of the 40 survivors 26 belong to one task, the
others to two. What remains has grown, mostly to more than three times its activation where one latent is left (country_capital: from 10
to 35). These are the candidates for task executors, which the next notebook tries one by one.
"""

# %% [markdown]
"""
## What goes on from here

The next notebook tries the surviving latents one by one. It reads them at `layer_executor`.
"""

# %%
keep, keep_change = by_layer[layer_executor] if layer_executor in by_layer else cleaned_at(layer_executor)
start = suite[Site("resid_pre", layer_executor)].encode(vectors[:, layer_executor])
arrays = {"f": keep.f, "vector": keep.vector, "l0": keep.l0, "change": keep_change, "encoded": start}
store.save("cleaned", arrays, meta={"tasks": names})
if sweep_widths:
    store.save("cleaned_sweep", survivors, meta={"tasks": names})

# %% tags=["nbval-check-output"]
ratio, margin = (
    float(l0.mean() / encoded_l0.mean()) if encoded_l0.any() else np.nan,
    float(change["TVC"].mean() - change["task vector"].mean()),
)
nll_tvc, nll_tv = float(of(tvc_test, picks["TVC"]).mean()), float(tv_test.mean())
share, share_bias = float(wins.mean()), float(wins_bias.mean())
at_elbow = {method: values.mean(axis=0) for method, values in curves.items()}
elbow = int(np.diff(at_elbow["task vector"]).argmin()) + 1  # the first layer behind the largest fall
lead = [float(at_elbow[method][elbow] - at_elbow["TVC"][elbow]) for method in ("SAE reconstruction", "ITO(20)")]
numbers = [
    ("tvc_l0", "Fig 3b", 3.78, float(l0.mean()), "at most 0.3 x encoded L0", ratio <= 0.3),
    ("encoded_l0", "Fig 3b", 10.87, float(encoded_l0.mean()), "more than TVC leaves", ratio < 1),
    (
        "tvc_minus_tv",
        "Fig 3a",
        -0.003,
        margin,
        "relative loss change at most 0.05 above the task vector's",
        margin <= 0.05,
    ),
    ("tvc_nll", "Fig 3a", None, nll_tvc, f"no worse than the task vector's {nll_tv:.2f}", nll_tvc <= nll_tv),
    ("latents_removed", "Sec 3.1", "50 to 70 %", f"{100 * (1 - ratio):.0f} %", "at least half", ratio <= 0.5),
    (
        "lead_at_elbow",
        "Fig 3a",
        [0.27, 0.23],
        lead,
        "at least 0.15 ahead of SAE reconstruction and ITO(20)",
        min(lead) >= 0.15,
    ),
    ("beats_ito_at_equal_l0", "App D.1", None, share, "on at least 80 % of the tasks", share >= 0.8),
    (
        "beats_ito_with_bias_at_equal_l0",
        "App D.1",
        None,
        share_bias,
        "on at least 80 % of the tasks",
        share_bias >= 0.8,
    ),
]
if sweep_widths:
    good = (dictionaries["left"] <= 0.5 * dictionaries["encoded"]) & (dictionaries["change"] <= change_here + 0.05)
    criterion = "SAEs of 01: at most half of the encoding's latents, loss change at most 0.05 above the task vector's"
    numbers.append(("every_dictionary", "App D.1", None, f"{good.sum()} of {len(good)}", criterion, bool(good.all())))
for name, item, published, ours, criterion, holds in numbers:
    ledger.record(name, item=item, published=published, ours=ours, criterion=criterion, holds=holds)
ledger.write()
verdicts = ledger.table().set_index("key")["holds"]
print(verdicts.to_string())
embedded.check_claims(model, ledger)

# %% [markdown]
"""
## What we saw

- Cleaning leaves 1.9 of 8.3 latents with a lower loss than the task vector's, on words that it has not seen.
- At equal L0 it beats ITO on 25 of 28 tasks, and ITO with the bias on 16.
- Which latents survive depends a little on prompts and learning rate; what they do does not.
- In dictionaries of 256 to 1,024 latents it leaves 1 to 11 of 3 to 109; eleven of twelve beat the task vector, one of the sparsest stays 0.01 behind.

## Limits

The support can only shrink, so a latent that the encoder misses is lost for good. Adam's rate and the penalty are in units of the
activations; the paper's rate, 0.15, left more latents and more loss here. Rate and penalties were set on an earlier suite of SAEs with the bars on L0
and ITO in view; the suite was trained anew afterwards, and the bars still hold. The pairs for fitting are few for the smallest tasks, and both cleaning and the choice of the
penalty use losses, which ITO does not see at all.

## Next

`04_executors_and_detectors` steers with the surviving latents alone, and looks for what switches them on.
"""
