//! What is asked when nobody says otherwise: questions whose answers differ in kind, so that a lost bit
//! shows somewhere.

pub(super) const PROMPTS: [&str; 16] = [
    "What is a coin?",
    "Name the planets of the solar system in order from the sun.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is 17 times 23? Show your steps.",
    "Explain to a child why the sky is blue.",
    "Write a short poem about the sea in winter.",
    "List three differences between a frog and a toad.",
    "Translate into French: The library opens at nine o'clock.",
    "Who wrote Hamlet, and what is it about?",
    "A train leaves at 14:20 and travels for 95 minutes. When does it arrive?",
    "Give me a recipe for pancakes.",
    "Summarise the water cycle in two sentences.",
    "What are the advantages and the disadvantages of working from home?",
    "Continue the sequence: 2, 3, 5, 7, 11, 13,",
    "Write a polite e-mail that asks for a day off.",
    "Describe how a bicycle stays upright.",
];
