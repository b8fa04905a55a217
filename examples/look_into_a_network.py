# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Look into a network
#
# We find functional networks in a small model. We look at where they are, read the texts in which each is most active,
# and compare silencing one with silencing random neurons. Model and texts come from packages. A CPU is enough.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import FunctionalNetworkConfig, discover_networks, lesion, select_neurons
from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model, wikipedia_passages
from fnsft_trl.probes.examples import find_examples


NETWORKS, TOKENS, READ, SCORED, DRAWS = 6, 20_000, 5_000, 500, 20

# %%
model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(embedded_model())
passages = wikipedia_passages("discovery")
others = wikipedia_passages("retention")  # of other articles

# %% [markdown]
# ## Find the networks
#
# This takes one pass over the text. Networks are also found on each half of the tokens, to see which ones replicate.
# The result is a template: a few megabytes that belong to this model.

# %%
config = FunctionalNetworkConfig(ica_components=NETWORKS, ica_max_tokens=TOKENS, ica_max_length=256)
template = discover_networks(model, tokenizer, passages, config)
template.save_pretrained("output/networks")

# %% [markdown]
# Reliability is the correlation of a network's loadings between the two halves. Its null is the reliability without
# co-activation, when each neuron is shuffled in time. A network near its null rarely replicates on other tokens.

# %%
for number, network in enumerate(template.components):
    above = template.reliability_above_null(number)
    layers = ", ".join(map(str, sorted(network.layers, key=network.layers.get, reverse=True)[:3]))
    print(f"network {number}: {network.neurons} neurons, most in layers {layers}; reliability {above:.2f} above null")

# %% [markdown]
# ## Read where they are active
#
# These are the passages with the largest activity of each network, in standard deviations. What they seem to be about
# is a guess until the network is silenced.

# %%
examples = find_examples(model, tokenizer, template, {"wikipedia": others}, count=2, max_tokens=READ)
for number, found in enumerate(examples.networks):
    for example in found:
        print(f"network {number}, {example.peak:.1f}: {''.join(example.tokens).strip()!r}")

# %% [markdown]
# ## Silence one by hand
#
# `lesion` zeroes neurons for as long as the block lasts. `like=` gives the control as many neurons in every layer.


# %%
@torch.no_grad()
def loss():
    tokens = tokenizer(others[0], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
    return model(tokens, labels=tokens).loss.item()


whole = loss()
network = select_neurons(template, component_ids=[0])
control = select_neurons(template, selector="random", like=network)
for name, mask in {"network 0": network, "as many random neurons": control}.items():
    with lesion(model, mask):
        print(f"{name}: {loss() - whole:+.3f} nats per token")

# %% [markdown]
# ## Silence it beside controls
#
# One passage and one control prove nothing. `fnsft probe` silences a network on many passages, and compares it with
# many random masks and with neurons of the same amplitude. Its verdict says whether the damage may be chance, or may
# come from loud neurons. Here it probes network 0 on few tokens. Use more before you claim anything.


# %%
def fnsft(*words):
    if main([str(word) for word in words]):
        raise SystemExit("see the line above")


asked = ["--networks", 0, "--curves", "lesion", "--max_tokens", SCORED, "--draws", DRAWS]
fnsft("probe", "embedded", "output/networks", "--data", "wikipedia=embedded", *asked, "--output_dir", "output/probe")

# %% [markdown]
# ## All on one page
#
# The atlas is one HTML file that needs nothing else: networks, layers, texts and the verdict.

# %%
fnsft("inspect", "output/networks", "--html", "output/atlas.html", "--probe", "output/probe")
