"""Which of Hugging Face's architectures run in every profile: one for each way of computing; `deep` runs them all.

An architecture that is added joins these where it computes something that none of them does. What several have in
common (rotary positions, norms first, a sigmoid in the gate) is met by the way.
"""

MECHANISMS: dict[str, str] = {
    # decoders
    "gpt2": "learned positions, weights that lie the other way round, a head tied to the embedding",
    "gpt_neo": "global and local attention by turns",
    "gptj": "rotary positions in pairs, on a part of each head; attention and perceptron side by side",
    "gpt_bigcode": "one key and value for all queries",
    "opt": "positions from the mask, an embedding projected on the way in and out",
    "bloom": "biases by distance (ALiBi), an activation that is a custom autograd function",
    "llama": "rotary positions by halves, RMS norms, grouped keys, a gated perceptron",
    "gemma2": "scores and logits squashed, scaled embeddings, norms with one added to the weight",
    "phi3": "gate and up, and queries, keys and values, as one product",
    "nemotron": "squared ReLU, layer norms with one added to the weight",
    "olmo": "norms without parameters",
    "qwen3": "queries and keys with norms of their own",
    "xglm": "positions by sines, in float32 alone",
    # experts
    "mixtral": "the best two experts for each token",
    "gpt_oss": "experts with biases, sinks in the softmax, a sliding window",
    "deepseek_v3": "latent attention, groups of experts, one expert that is shared",
    "switch_transformers": "one expert for each token, which runs where there is a token for it",
    "nllb_moe": "experts of a capacity",
    # recurrences
    "mamba": "a state space, scanned",
    "recurrent_gemma": "a gated linear recurrence, with attention between",
    "xlstm": "a matrix for a memory, in chunks",
    "lfm2": "short convolutions with gates",
    "qwen3_next": "the gated delta rule, in chunks",
    # encoders
    "bert": "types of tokens, a head tied to the embedding with a bias of its own",
    "albert": "one layer for all depths",
    "deberta_v2": "relative positions of content and place, apart",
    "modernbert": "sliding windows, fused products",
    "longformer": "windows by overlapping views",
    "big_bird_sparse": "blocks drawn at random",
    "fnet": "Fourier transforms in place of attention",
    "xlnet": "samples on the second axis, relative positions by a shift",
    "nystromformer": "landmarks, and a pseudo-inverse by iteration",
    "convbert": "a convolution with a kernel for each token",
    "squeezebert": "grouped convolutions as layers",
    "yoso": "attention by expected collisions of hashes",
    "canine": "embeddings by hashes, sequences made shorter by a convolution and longer again",
    # encoders with decoders
    "t5": "relative positions by buckets, shared by the layers",
    "bart": "an embedding shared by encoder, decoder and head",
    "prophetnet": "streams of the next two tokens",
    # images
    "vit": "patches by a convolution, a token for the class",
    "swin": "windows that are shifted, patches that are merged",
    "beit": "biases by relative position in the plane",
    "dinov3": "rotary positions in the plane, registers",
    "convnext": "depthwise convolutions, layers scaled by a vector",
    "resnet": "batch norms, pooling",
    "bit": "standardised weights of convolutions, group norms",
    "efficientnet": "inverted bottlenecks, squeeze and excitation",
    "segformer": "keys made fewer by a convolution",
    "poolformer": "pooling in place of attention",
    "focalnet": "context by convolutions of growing reach",
    "hiera": "queries pooled in units of the mask",
    # sounds
    "wav2vec2": "a weight-normed grouped convolution for positions",
    "wavlm": "relative positions with gates",
    "whisper": "an encoder of spectrograms by convolutions",
    "sew": "sounds made shorter by pooling, and longer again",
    # several kinds of inputs
    "clip": "every text with every image: samples mix in the loss",
    "siglip": "the same by sigmoids, with a pooling by attention",
    "lxmert": "two towers that attend to each other",
    "perceiver": "latents that belong to no sample",
    "decision_transformer": "states, actions and returns in turns",
    # series
    "patchtst": "channels by themselves, as samples are",
    "patchtsmixer": "perceptrons across patches",
    "autoformer": "correlations by Fourier transforms, series taken apart",
    "informer": "queries chosen by the data",
}
