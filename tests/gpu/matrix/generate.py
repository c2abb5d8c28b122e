"""Transformers: greedy generation with a GPT-2 in float32 and a Llama in bfloat16, both of random weights, with the
key-value cache. The digest is that of the tokens and of the logits behind the last one.
"""

import common


def main():
    options = common.parse(__doc__)
    torch = common.torch_that_repeats()
    try:
        import transformers
    except ImportError as error:
        common.skip(f"no Transformers: {error}")
    transformers.logging.set_verbosity_error()
    ballast = common.Ballast()

    torch.manual_seed(3)
    gpt2 = transformers.GPT2Config(
        vocab_size=8192, n_positions=256, n_embd=768, n_layer=8, n_head=12, bos_token_id=0, eos_token_id=None
    )
    llama = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=None,
    )
    models = [
        transformers.GPT2LMHeadModel(gpt2).cuda().eval(),
        transformers.LlamaForCausalLM(llama).to(torch.bfloat16).cuda().eval(),
    ]
    prompt = torch.randint(1, 8192, (4, 32), generator=torch.Generator().manual_seed(4)).cuda()
    mask = torch.ones_like(prompt)

    def work():
        parts = []
        for model in models:
            with torch.inference_mode():
                tokens = model.generate(
                    prompt, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0
                )
                logits = model(tokens).logits[:, -1]
            common.check(tuple(tokens.shape) == (4, 64), f"tokens are of shape {tuple(tokens.shape)}")
            common.check(torch.equal(tokens[:, :32], prompt), "the prompt has changed")
            parts += [common.bits(tokens), common.bits(logits)]
        ballast.turn()
        return common.digest(*parts)

    digest, rounds = common.same_each_time(options.seconds, work)
    common.report(f"Transformers {transformers.__version__}, PyTorch {torch.__version__}", digest, rounds)


main()
