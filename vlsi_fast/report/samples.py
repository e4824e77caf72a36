def what_layers_say(run, count, max_new_tokens):
    return None
