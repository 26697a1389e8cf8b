"""The calibration windows that `gptq quantize --seed S` draws, for a quantizer that is given token ids."""

WORD = 2**64


def mt19937_64(seed):
    """Yield the numbers of the C++ standard's std::mt19937_64."""
    size, middle = 312, 156
    state = [seed % WORD]
    for i in range(1, size):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) % WORD)
    upper, lower = 0xFFFFFFFF80000000, 0x7FFFFFFF
    while True:
        for i in range(size):
            x = (state[i] & upper) | (state[(i + 1) % size] & lower)
            state[i] = state[(i + middle) % size] ^ (x >> 1) ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for x in tuple(state):
            x ^= (x >> 29) & 0x5555555555555555
            x ^= (x << 17) & 0x71D67FFFEDA60000
            x ^= (x << 37) & 0xFFF7EEE000000000
            yield x ^ (x >> 43)


def draw_windows(ids, samples, sequence_length, seed):
    """Draw windows like draw_windows of csrc/model/calibration.cpp."""
    bound = len(ids) - sequence_length + 1
    if bound < 1:
        raise ValueError(f"the text must have at least one window of {sequence_length} tokens, has {len(ids)}")
    rejected = WORD % bound
    numbers = (number for number in mt19937_64(seed) if number >= rejected)
    starts = (next(numbers) % bound for _ in range(samples))
    return [ids[start : start + sequence_length] for start in starts]
