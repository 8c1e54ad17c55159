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
# Every layer can be read through a few dozen latents

**Claim.** Sparse autoencoders (SAEs) on the residual stream and on attention outputs, and transcoders around MLPs, replace the model's
activations by a few active latents per token, at every layer, and the model hardly notices.

- You will see the objective, SAEs of three widths and four sparsities trained in front of you, the quality of the whole suite on fresh
  text, what some latents mean, and two ways in which such numbers are often flattered.
- You need a CPU and two minutes. By default the model is `icl-tiny`, the embedded one: a working example, not the paper's result.
- Source: Kharlapenko et al. (2025), ICL-SFC, App. B; Rajamanoharan et al. (2024), "Improving Dictionary Learning with Gated SAEs".
"""

# %% tags=["hide-input"]
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from icl_lib import embedded, figures
from icl_lib.cards.notebook import close_run, open_run
from icl_lib.features import latent_names, top_examples
from icl_lib.figures.style import plain_log
from icl_lib.models import Site, load_model, load_tokenizer, mesh_of
from icl_lib.runs import compute_dtype
from icl_lib.saes import harvest, load_suite, quality_table, save_sae
from icl_lib.saes.quality import frequency, fvu
from icl_lib.saes.survey import undominated
from icl_lib.training import Member, Plan
from icl_lib.training.recipes import SHORT_RUN, make_recipe
from icl_lib.training.state import stop_if_bad
from icl_lib.training.steps import finish, init_state, run_steps

# %% tags=["parameters", "hide-input"]
card: str = "tiny"  # name of the experiment card
model: str = "icl-tiny"  # name of an embedded model, hub id or folder of the model
saes: list[str] = ["icl-tiny"]  # name or folder of the SAE suite, or folders and hub paths with {layer} in them
sae_layers: list[int] = [0, 1, 2, 3, 4, 5]  # layers whose SAEs are loaded, counted as their files do
sae_variant: str = ""  # "paper" reads the ICL-SFC authors' SAEs as in their experiments; empty: as trained
text: str = "icl-tiny"  # plain text: an embedded model's, a data set's hub id, a file or folder
run_dir: str = "runs/tiny"  # where results go, from the repository root
seed: int = 0  # seed of prompts, corpora, training and random draws
layer_executor: int = 4  # layer (resid_pre) whose latents are looked for at the arrow
sweep_widths: list[int] = [256, 512, 1024]  # widths of SAEs trained in 01, tried in 03 and 04; [] trains none
sweep_sparsity: list[float] = [0.02, 0.05, 0.12, 0.3]  # their sparsity penalties, each at every width
sweep_steps: int = 600  # their training steps
quality_rows: int = 48  # rows of fresh text on which the model runs with each SAE in place
rate_rows: int = 400  # rows on which firing rates are counted

# %% [markdown]
"""
Model, suite and the run's store. A suite that does not fit the model is refused here, before anything is computed.
"""

# %% tags=["hide-input"]
store, ledger = open_run("01_sparse_autoencoders", globals())
lm = load_model(model, dtype=compute_dtype(), mesh="auto")
tokenizer = load_tokenizer(model)
suite = load_suite(saes, lm.config, sae_layers, variant=sae_variant or None, mesh=mesh_of(lm))

# %% [markdown]
"""
What SAEs are judged on: rows of the text that the card names, cut to the model's context. For `icl-tiny` it is fresh text of its language, drawn
from a seed of its own, which neither the model nor the SAEs were trained on.
"""


# %%
context, kept = min(128, lm.config.n_ctx), max(quality_rows, rate_rows)
corpus = embedded.open_corpus(text, tokenizer, context, bos_id=lm.config.bos_id, kept=kept)


def rows(n, seed=None):
    """Token rows on which SAEs are judged, or, with a seed, others to train on."""
    return corpus.held_out(n) if seed is None else corpus.training(n, seed)


# %% [markdown]
r"""
## The objective

Each SAE is *gated*: one path decides which latents are on, another how strongly. With $h = x W_{enc}$ and gate $\pi = h + b_{gate}$,

$$ f = 1[\pi > 0]\;\mathrm{ReLU}(h\, e^{r} + b_{mag}), \qquad \hat x = f W_{dec} + b_{dec}. $$

Training minimises reconstruction, sparsity of the gate, and the reconstruction that the gate alone would give, so that it learns to
open for a reason; a small ghost term revives dead latents:

$$ L = R(\hat x) + 2\lambda \sum_i \mathrm{ReLU}(\pi_i)\,\lVert W_{dec,i}\rVert
     + R(\mathrm{ReLU}(\pi) W_{dec} + b_{dec}) + \tfrac14 L_{ghost}, \qquad
   R(\hat x) = \frac{\lVert \hat x - x\rVert^2}{\lVert x - \bar x\rVert}. $$

The penalty weighs each latent by the length of what it writes, so the decoder cannot cheat by growing. A *transcoder* is the same thing
with another target: it reads what the MLP reads and predicts what the MLP writes.
"""

# %% [markdown]
"""
## SAEs trained here

On the residual stream before one layer: every width with every penalty, on the same batches, from one pass of the model. SAEs of one width
are stacked and stepped by one compiled program. We expect L0 (active latents per token) to fall once the penalty is on, to a level that the
penalty sets, and the fraction of variance unexplained (FVU) to be the lower the wider the dictionary. An empty list of widths skips
all parts on these SAEs, here and in notebooks 03 and 04.
"""

# %%
site = Site("resid_pre", layer_executor)
members = [Member(site, width, penalty) for width in sweep_widths for penalty in sweep_sparsity]
short = SHORT_RUN | {
    "learning_rate": 3e-3,
    "sparsity_warmup": sweep_steps // 5,
    "dead_after": 100,
}  # published for 150,000 steps
recipe = make_recipe("icl-sfc", n_steps=sweep_steps, batch_size=512, **short)


def train_sweep(n_points=25):
    """The SAEs by member, and the curves: steps (point,), then (point, member) L0 and FVU, means up to the next point, and dead latents."""
    acts = {site: jnp.asarray(a) for site, a in harvest(lm, rows(1000, seed + 1), [site], dtype="float16").items()}
    plan, points = Plan(members, recipe, {site: acts[site].shape[-1]}), []
    state = init_state(plan, acts, key=jax.random.key(seed))
    ends = np.unique(np.linspace(0, sweep_steps, n_points + 1).astype(int))
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        state, means = run_steps(state, acts, last - first, plan)
        stop_if_bad(means, plan)
        points.append(((first + last) / 2, np.asarray(means.l0), np.asarray(means.fvu), 100 * np.asarray(means.dead)))
    return finish(state, plan), [np.array(column) for column in zip(*points, strict=True)]


trained, curves = train_sweep() if members else ({}, None)

# %% [markdown]
"""
What to look at: how the three quantities move once the penalty is on, and how a column differs from the one to its left.
"""

# %%
if members:
    fig, panels = plt.subplots(
        3, len(sweep_widths), figsize=(9, 5.8), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.9, len(sweep_sparsity)))
    for i, member in enumerate(members):
        column, colour = sweep_widths.index(member.d_sae), colours[sweep_sparsity.index(member.sparsity)]
        for row in range(3):
            panels[row, column].plot(curves[0], curves[row + 1][:, i], color=colour, label=f"λ = {member.sparsity:g}")
    for column, width in enumerate(sweep_widths):
        panels[0, column].set_title(f"{width} latents")
        panels[2, column].set_xlabel("training step")
    plain_log(panels[0, 0].yaxis)
    plain_log(panels[1, 0].yaxis)
    panels[0, 0].set_ylabel("L0 (active latents)")
    panels[1, 0].set_ylabel("FVU (1: the mean)")
    panels[2, 0].set_ylabel("dead latents (%)")
    panels[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.show(
        1,
        "Training of the SAEs, one column for each width and one line for each penalty λ (darker is "
        "smaller): active latents per token, unexplained variance and dead latents against the step. All "
        "panels of a row share their scale.",
    )

# %% [markdown] tags=["icl-tiny"]
r"""
L0 falls for about 300 steps, to between 5 and 126. FVU goes up for a moment while the penalty comes on, most of all in the widest, and
comes down as the dictionary learns to say the same with fewer words. At each penalty a wider dictionary ends with a lower FVU, but also with more
active latents: at $\lambda = 0.05$ four times the width takes more than twice the latents. So the two have to be read together, on text that is new to the SAEs, below.
Hardly any latent dies, and ghost gradients bring those back that do.
"""

# %% [markdown]
r"""
## Gated and folded are one function

Gate and magnitude see the same projection, so the gate is a threshold on the magnitude: `fold()` writes the SAE as a JumpReLU one,
$f = p\,1[p > \theta]$ with $p = x W' + b'$. All later notebooks work on this form. The difference should be rounding.
"""

# %% tags=["nbval-check-output"]
x = jnp.asarray(harvest(lm, rows(25), [site])[site])
sae = next(iter(trained.values()), suite[site])
f, folded = sae.encode(x), sae.fold().encode(x)
differ = float(jnp.abs(f - folded).max() / f.max())
flipped = float(jnp.mean((f > 0) != (folded > 0)))
assert differ < 1e-3 and flipped < 1e-4, (
    f"fold() changed features by {differ:.1e} of the largest, {flipped:.1e} of them on or off"
)
print(f"{sae.architecture} -> {sae.fold().architecture}: equal up to rounding")

# %% [markdown]
"""
## The suite

Three kinds at every layer: the residual stream, the output of attention, and MLP transcoders. They come with the repository; what
trained them is `make retrain`. We judge them on rows that neither model nor SAEs have seen, without BOS and padding:

- **L0**: latents with f > 0, mean per token. **FVU**: squared error over variance *about the mean*; 1 is as bad as predicting the mean.
- **CE recovered**: we put the reconstruction in place of the activation and let the model go on.
  $(CE_{abl} - CE_{sae})/(CE_{abl} - CE_{clean})$, with zero and with mean ablation; 1 means that the model does not notice.
- **dead**: part of the latents that never fired on the larger set of rows; **dense**: part that fires on more than a tenth of tokens.
- **decoder cosine**: that of a latent's direction with the most similar other one, median over latents; near 1, two latents say the same.
"""

# %%
table = quality_table(lm, suite, rows(quality_rows), batch_size=16)

# %% [markdown]
"""
A latent rarer than one token in the sample looks dead in it. Firing rates are therefore counted on many more rows than the model is run on
with each SAE in place.
"""

# %%
held_out = harvest(lm, rows(rate_rows), list(suite), dtype="float16", batch_size=16)
rate_of = eqx.filter_jit(lambda sae, x: frequency(sae.encode(x)))
rates = {at: np.asarray(rate_of(sae, jnp.asarray(held_out[at], jnp.float32))) for at, sae in suite.items()}
table["dead"] = [float((rates[sae.site_in] == 0).mean()) for sae in suite.values()]
table["dense"] = [float((rates[sae.site_in] > 0.1).mean()) for sae in suite.values()]
store.save_table("sae_quality", table)

# %%
columns = [
    "kind",
    "layer",
    "d_sae",
    "l0",
    "fvu",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "dead",
    "dense",
    "decoder_cosine",
]
digits = {"l0": 1, "ce_recovered_zero": 3, "ce_recovered_mean": 3}
figures.style_table(table[columns], caption=f"{len(suite)} SAEs on fresh rows", digits=digits, shade=["l0", "fvu"])

# %% [markdown]
"""
The same as a figure: to the left the price in latents and the error, to the right what the model keeps.
"""

# %%
figures.sae_quality(table, recovered="ce_recovered_zero", bar=0.95)
figures.show(
    2,
    "The suite by layer: active latents per token and unexplained variance to the left, the share of the "
    "model's loss that is recovered to the right, where the dotted line is the bar. Colours are the three"
    " kinds of SAE.",
)

# %% tags=["nbval-check-output"]
kinds = table.groupby("kind").agg(
    n=("layer", "size"), l0=("l0", "mean"), worst=("ce_recovered_zero", "min"), dead=("dead", "max")
)
print(kinds.round({"l0": 0, "worst": 2, "dead": 2}).to_string())

# %% [markdown]
"""
What stands behind these ratios, in nats per token. We expect the activations of single attention and MLP layers to matter little by themselves,
and the ratio to say little where it divides by a loss that is next to nothing.
"""

# %% tags=["nbval-check-output"]
cost = table.assign(removed=table["ce_zero"] - table["ce_clean"], replaced=table["ce_sae"] - table["ce_clean"])
streams, others = cost[cost["kind"] == "residual"], cost[(cost["kind"] != "residual") & (cost["layer"] >= 2)]
if len(streams):
    print(f"residual: with the SAE at most {streams['replaced'].max():.3f} nats more")
if len(others):
    print(f"attention and MLP from layer 2 on: without the activation at most {others['removed'].max():.3f} nats more")
    for which, at in (
        ("lowest", others["ce_recovered_zero"].idxmin()),
        ("highest", others["ce_recovered_zero"].idxmax()),
    ):
        kind, layer, ratio, replaced = others.loc[at, ["kind", "layer", "ce_recovered_zero", "replaced"]]
        print(f"{which} CE recovered there: {ratio:.1f}, {kind} of layer {layer}, with the SAE {replaced:+.4f} nats")

# %% [markdown] tags=["icl-tiny"]
"""
With any residual SAE in place the model keeps at least 0.999 of what it would lose without the activation, at 8 to 26 active latents of
1,024; at most 3 in 1,000 latents are dead. FVU is between 0.01 and 0.04.

The curves of the other two kinds say little about them. From layer 2 on an attention or MLP layer does so little on an average token that removing it
costs at most 0.013 nats, and of so small a loss any error is a large part: the lowest of them, the transcoder of layer 2 (0.77), adds 0.0005 nats,
less than the residual SAEs, which add up to 0.008. Values above 1 are as empty: at the attention of layer 5 (2.22) the reconstruction costs
nothing that four digits show.
"""

# %% [markdown]
"""
## Sparsity and width: the front

The SAEs trained above, by the same measures on the same rows, beside the suite's own SAE of that layer (star; it was trained longer and on
more tokens). To the left and below is better in the first panel, to the left and above in the second. A wider dictionary has more words to
choose from, so we expect it to be ahead at equal L0. The grey band joins the SAEs that no other beats in both. They are saved for notebooks 03 and 04, which ask what task vectors and executors look
like in each.
"""

# %%
if members:
    sweep = quality_table(lm, trained | {"suite": suite[site]}, rows(quality_rows), batch_size=16)
    sweep["sparsity"] = [*(m.sparsity for m in members), np.nan]
    own, sweep = sweep.iloc[-1], sweep.iloc[:-1].copy()
    sweep["folder"] = [f"saes_sweep/{m.d_sae}_{m.sparsity:g}" for m in members]
    for folder, one in zip(sweep["folder"], trained.values(), strict=True):
        save_sae(one, store.run_dir / folder)
    store.save_table("sae_sweep", sweep, meta={"site": str(site)})
    shown = [
        "d_sae",
        "sparsity",
        "l0",
        "fvu",
        "ce_recovered_zero",
        "ce_recovered_mean",
        "dead",
        "dense",
        "decoder_cosine",
    ]
    sign = {"fvu": 1, "ce_recovered_zero": -1}  # the lower the better, and the other way round
    fronts = {
        column: sweep.loc[undominated(sweep["l0"], s * sweep[column])].sort_values("l0") for column, s in sign.items()
    }
digits |= {"sparsity": 2}
figures.style_table(
    sweep[shown], caption=f"SAEs trained here, {site}", digits=digits, shade=["l0", "fvu"]
) if members else None

# %%
if members:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    for ax, column, label in (
        (left, "fvu", "FVU (0 perfect, 1 the mean)"),
        (right, "ce_recovered_zero", "CE recovered, zero ablation"),
    ):
        figures.width_lines(sweep, column, ax=ax)
        ax.plot(
            fronts[column]["l0"],
            fronts[column][column],
            color="grey",
            linewidth=5,
            alpha=0.3,
            zorder=0,
            label="Pareto front",
        )
        ax.plot(
            own["l0"],
            own[column],
            "*",
            color=figures.OKABE_ITO["vermillion"],
            markersize=11,
            label=f"the suite's ({own['d_sae']})",
        )
        ax.set_ylabel(label)
    left.legend()
    figures.show(
        3,
        "Error (left) and recovered loss (right) of the SAEs trained here against the number of active "
        "latents. A line joins the penalties of one width, the grey band joins the SAEs that no other "
        "beats in both, and the star is the suite's own SAE of that layer.",
    )

# %%
if members:
    for column, front in fronts.items():
        print(f"SAEs by width on the front of L0 and {column}: {front['d_sae'].value_counts().sort_index().to_dict()}")

# %% [markdown]
"""
Which SAEs lie on a front is decided by small differences, and another processor trains slightly other SAEs. What does not change:
"""

# %% tags=["nbval-check-output"]
if members:
    rises = [part.sort_values("l0")["fvu"].is_monotonic_decreasing for _, part in sweep.groupby("d_sae")]
    print(f"the more latents are active, the lower is FVU, at {sum(rises)} of {len(rises)} widths")
    print(f"CE recovered is above 0.95 in {(sweep['ce_recovered_zero'] > 0.95).sum()} of {len(sweep)} SAEs")

# %%
if len(streams):
    figures.say(
        f"**With a residual SAE of the suite in place the model keeps at least {np.floor(1000 * streams['ce_recovered_zero'].min()) / 1000:.3f} of "
        f"what it would lose without the activation, at {streams['l0'].min():.0f} to {streams['l0'].max():.0f} active latents.**"
    )

# %% [markdown] tags=["icl-tiny"]
"""
At equal L0 width matters little here. The three lines nearly coincide in FVU, and below 20 latents per token the narrowest is ahead in CE
recovered; nearly every SAE lies on a front. This was not our expectation, and it is partly one of training: a wider dictionary needs longer,
and the suite's SAE, of the same width as the widest and trained on three times as many tokens, is well below all lines. CE recovered is
0.99 or more from nine latents per token on, and 0.98 at five.
"""

# %% [markdown]
"""
## How often latents fire

A dictionary is in good health if few latents never fire and few fire all the time. We expect rates spread over two or three decades,
most of them rare.
"""

# %%
residual = [at for at in suite if at.name == "resid_pre"]
fig, ax = plt.subplots(figsize=(6.4, 3))
colours = plt.get_cmap("cividis")(np.linspace(0, 0.9, len(residual)))
for at, colour in zip(residual, colours, strict=True):
    ax.hist(
        np.log10(rates[at][rates[at] > 0]),
        bins=np.linspace(-5, 0, 41),
        histtype="step",
        color=colour,
        label=f"layer {at.layer}",
    )
ax.axvline(-1, color="black", linestyle=":", linewidth=1)
ax.set(
    xlabel="log10 of the part of tokens on which a latent fires (dotted: dense)",
    ylabel="latents",
    title="residual SAEs",
)
ax.legend()
figures.show(
    4,
    "How often latents fire: the distribution of firing rates for each residual SAE of the suite. To the "
    "right of the dotted line a latent fires on more than a tenth of the tokens.",
)

# %% [markdown] tags=["icl-tiny"]
"""
One hump per layer, between one token in a thousand and one in ten, and almost nothing to the right of the dotted line: few latents are
dense. The first layer sees words alone and has the rarest latents; those of layers 2 to 4 fire most often.
"""

# %% [markdown]
r"""
## Two ways to look better than one is

**FVU about zero.** Dividing the error by $\sum\lVert x\rVert^2$ instead of the variance counts the constant part of the activation as
explained, although predicting it takes no latent at all. **Zero ablation.** Taking a layer's output away altogether is so destructive
that anything recovers most of it; the mean is the fairer rival. We expect both to flatter.
"""

# %%
honest, flattered = [], []
for at in residual:
    x = jnp.asarray(held_out[at][:8000], jnp.float32)
    x_hat = suite[at](x)
    honest.append(float(fvu(x, x_hat)))
    flattered.append(float(jnp.sum((x - x_hat) ** 2) / jnp.sum(x**2)))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
layers = [at.layer for at in residual]
left.plot(layers, honest, "o-", label="about the mean")
left.plot(layers, flattered, "s--", label="about zero")
left.set(xlabel="layer", ylabel="unexplained part", ylim=(0, None), title="error of the residual SAEs")
left.legend()
for kind, part in table.groupby("kind"):
    right.plot(part["ce_recovered_zero"], part["ce_recovered_mean"], "o", color=figures.KIND_COLOURS[kind], label=kind)
low = min(table["ce_recovered_mean"].min(), table["ce_recovered_zero"].min())
right.plot([low, 1], [low, 1], color="black", linewidth=0.8)
right.set(
    xlabel="CE recovered, zero ablation",
    ylabel="CE recovered, mean ablation",
    title="below the line: zero ablation flatters",
)
right.legend()
figures.show(
    5,
    "Two conventions beside their rivals. To the left the error of the residual SAEs by layer, divided by"
    " the variance about the mean or about zero; to the right recovered loss against zero and against "
    "mean ablation, one dot for each SAE. On the line the two agree; below it zero ablation flatters.",
)

# %% tags=["nbval-check-output"]
ratio = float(np.mean(np.array(honest) / np.array(flattered)))
drop = float((table["ce_recovered_zero"] - table["ce_recovered_mean"]).mean())
print(f"FVU about the mean is {ratio:.1f} times the one about zero; mean ablation costs {drop:.2f} of CE recovered")

# %% [markdown] tags=["icl-tiny"]
"""
FVU about zero is lower at every layer, but by a tenth only: this model's residual stream has a small mean (that of large models does not). The
second expectation was wrong here. The transcoders lie *above* the line: putting in the mean hurts more than putting in nothing, as the average over
prompts and sentences fits neither. The points far to the right are the attention outputs whose removal costs next to nothing. So neither
number is the strict one by nature, and the table has both.
"""

# %% [markdown]
"""
## What latents mean

For a few latents of one residual SAE, the windows of text in which they fire most. We choose them by rank of their mean activation on
the text (the median latent, one in five, one in fifty), and not by how well they read.
"""

# %%
windows = corpus.stretches(rate_rows, seed)
f = suite[site].encode(jnp.asarray(harvest(lm, windows, [site])[site]))
strength, rate = np.asarray(f.mean(axis=0)), np.asarray(frequency(f))
ranked = np.argsort(-strength)
chosen = [int(ranked[int(q * len(ranked))]) for q in (0.5, 0.2, 0.02)]
found = top_examples(lm, suite[site], windows, chosen, k=5)


# %%
named = latent_names(lm, suite[site], tokenizer, windows, chosen)


def show_latent(number, i):
    """The strongest windows of the i-th chosen latent."""
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in found.tokens[i]]
    title = f"{site}, latent {named[i]}: fires on {100 * rate[chosen[i]]:.2g} % of tokens"
    figures.examples_figure(words, list(found.activation[i]), title=title, size=7.5)
    stronger = 100 * np.mean(strength > strength[chosen[i]])
    figures.show(
        number,
        f"The windows in which latent {named[i]} fires most; {stronger:.0f} % of the latents are stronger on average. The darker a word, "
        "the larger is the activation; the word after the darkest one is what the model has to write next.",
    )


show_latent(6, 0)

# %%
show_latent(7, 1)

# %%
show_latent(8, 2)

# %% [markdown] tags=["icl-tiny"]
"""
**Each of the three tells what is due next rather than what a word means**: it fires just before a word of one kind has to be written, as latents at
the arrow of a prompt do in the notebooks that follow.
"""

# %% [markdown]
"""
The claims of this notebook go to the ledger of the run.
"""

# %% tags=["nbval-check-output", "hide-input"]
n_layers, spots = lm.config.n_layers, table[table["kind"] == "residual"]
every_layer = all(set(part["layer"]) == set(range(n_layers)) for _, part in table.groupby("kind"))
good, bar = (
    (spots["ce_recovered_zero"] >= 0.95) & (spots["l0"] <= 40),
    "residual SAEs: CE recovered >= 0.95 at L0 <= 40",
)
claims = [
    ("suite", 54, len(suite), "3 kinds x all layers", every_layer and table["kind"].nunique() == 3),
    ("ce_recovered", None, spots["ce_recovered_zero"].min(), bar, good.all()),
    ("largest_l0", None, spots["l0"].max(), "residual SAEs: L0 <= 40", (spots["l0"] <= 40).all()),
    ("dead", None, table["dead"].max(), "dead latents <= 10 % in every SAE", (table["dead"] <= 0.1).all()),
]
close_run(ledger, model, [(key, "App. B", *rest[:-1], bool(rest[-1])) for key, *rest in claims])

# %% [markdown] tags=["icl-tiny"]
"""
## What we saw

- 18 SAEs, three kinds at every layer. Every residual SAE: CE recovered at least 0.999 at L0 of at most 26, at most 0.3 % dead.
- Twelve SAEs of 256 to 1,024 latents, L0 5 to 126, lie on nearly one line of L0 and error: training longer gains more than width.
- Gated SAEs and their folded JumpReLU form are the same function.
- FVU about zero flatters a little; zero ablation does not flatter here, and CE recovered means little where the ablation costs nothing.
- Three latents of layer 4, chosen by rank, read as situations in which a word of one kind is due.
"""

# %% [markdown] tags=["icl-tiny"]
"""
## Limits

The text is a small generated language with 1,316 words, of which 1,024 latents can hold most: that SAEs do this well here says nothing about their
quality on real text. Three latents are an illustration, not a sample. Nothing here shows that the model *uses* these directions; that takes
interventions, in the next notebooks.
"""

# %% [markdown]
"""
## Next

[02_task_vectors](02_task_vectors.ipynb) looks for the place where the task is kept, and asks what these SAEs see of it.
"""
