//! What is asked: conversations drawn from a seed. A rerun asks the same; two rounds, or two loads of one
//! round, never share a prefix by accident.

use super::random::Random;

/// Common English words; nearly every vocabulary has each, with the space before it, as one token.
const WORDS: &str = include_str!("words.txt");

/// What one turn's question is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Questions {
    /// So many random words.
    Words(usize),
    /// So many tokens in process; over HTTP as many words.
    Tokens(usize),
    /// A file's prompts, in their order and again from the first.
    Dataset { name: String, prompts: Vec<String> },
}

/// What clients ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub questions: Questions,
    /// Words that all conversations of a round begin with.
    pub shared_prefix_words: usize,
    /// Questions of a conversation; each but the first follows the answer before it.
    pub turns: usize,
    pub output_tokens: usize,
    pub seed: u64,
}

/// One conversation's questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    /// Before the first question, empty or ending in a space.
    pub(super) prefix: String,
    /// At least one.
    pub(super) questions: Vec<String>,
    /// Tokens of the first question, where it is cut to be exact.
    pub(super) exact_tokens: Option<usize>,
}

impl Workload {
    /// `count` conversations of one round under one load. `load` is any name of that load.
    pub(super) fn scripts(&self, round: &str, load: &str, count: usize) -> Vec<Script> {
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        let draw = |names: &[&str], number: usize| {
            let mut random = Random::new(self.seed, names);
            let drawn: Vec<&str> = (0..number).map(|_| words[random.below(words.len())]).collect();
            drawn.join(" ")
        };
        let mut prefix = draw(&[round, load, "prefix"], self.shared_prefix_words);
        if !prefix.is_empty() {
            prefix.push(' ');
        }
        // Another round goes on in the file where this one is likely to have ended.
        let first = Random::new(self.seed, &[round, load, "dataset"]).below(1 << 20);
        let question = |conversation: usize, turn: usize| {
            let names = [round, load, &conversation.to_string(), &turn.to_string()];
            match &self.questions {
                Questions::Words(number) | Questions::Tokens(number) => draw(&names, *number),
                Questions::Dataset { prompts, .. } => {
                    prompts[(first + conversation * self.turns + turn) % prompts.len()].clone()
                }
            }
        };
        let script = |conversation| Script {
            prefix: prefix.clone(),
            questions: (0..self.turns).map(|turn| question(conversation, turn)).collect(),
            exact_tokens: match self.questions {
                Questions::Tokens(number) => Some(number),
                Questions::Words(_) | Questions::Dataset { .. } => None,
            },
        };
        (0..count).map(script).collect()
    }
}

/// A conversation as far as it has come: what a model is asked next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dialogue {
    /// Questions and answers by turns, the prefix with the first; ends with a question.
    pub(super) said: Vec<String>,
    prefix_length: usize,
    exact_tokens: Option<usize>,
}

impl Dialogue {
    pub(super) fn new(script: &Script) -> Self {
        Self {
            said: vec![script.prefix.clone() + &script.questions[0]],
            prefix_length: script.prefix.len(),
            exact_tokens: script.exact_tokens,
        }
    }

    pub(super) fn go_on(&mut self, answer: String, question: &str) {
        self.said.push(answer);
        self.said.push(question.to_owned());
        self.exact_tokens = None;
    }

    /// As plain text for a model without a template: each part on lines of its own.
    pub(super) fn text(&self) -> String {
        self.said.join("\n")
    }

    /// As messages of a user and an assistant by turns.
    pub(super) fn messages(&self) -> serde_json::Value {
        let message = |(index, content): (usize, &String)| {
            let role = if index % 2 == 0 { "user" } else { "assistant" };
            serde_json::json!({ "role": role, "content": content })
        };
        self.said.iter().enumerate().map(message).collect()
    }

    /// The shared prefix, and how many tokens may follow it.
    pub(super) fn exact(&self) -> Option<(&str, usize)> {
        Some((&self.said[0][..self.prefix_length], self.exact_tokens?))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn workload(questions: Questions) -> Workload {
        Workload { questions, shared_prefix_words: 0, turns: 1, output_tokens: 4, seed: 1 }
    }

    #[test]
    fn a_rerun_asks_the_same_and_nothing_else_does() {
        let words = workload(Questions::Words(12));
        let asked = |workload: &Workload, round: &str, load: &str| workload.scripts(round, load, 3);
        assert_eq!(asked(&words, "0", "8"), asked(&words, "0", "8"));
        let other_seed = Workload { seed: 2, ..words.clone() };
        let all = [
            asked(&words, "0", "8"),
            asked(&words, "1", "8"),
            asked(&words, "0", "1"),
            asked(&other_seed, "0", "8"),
        ]
        .concat();
        let beginnings: HashSet<String> =
            all.iter().map(|s| s.questions[0].split(' ').take(6).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(beginnings.len(), all.len());
        assert!(all.iter().all(|script| script.questions[0].split(' ').count() == 12));
        // More of the same are the same at first: a longer run repeats a shorter one.
        assert_eq!(words.scripts("0", "8", 5)[..3], asked(&words, "0", "8"));
    }

    #[test]
    fn a_shared_prefix_is_of_one_round_and_one_load() {
        let shared = Workload { shared_prefix_words: 5, ..workload(Questions::Words(2)) };
        let prefixes = |round, load| {
            let scripts = shared.scripts(round, load, 4);
            scripts.into_iter().map(|script| script.prefix).collect::<HashSet<String>>()
        };
        let of_first = prefixes("0", "8");
        assert_eq!(of_first.len(), 1);
        assert!(
            of_first.iter().all(|prefix| prefix.split_whitespace().count() == 5 && prefix.ends_with(' '))
        );
        assert!(of_first.is_disjoint(&prefixes("1", "8")) && of_first.is_disjoint(&prefixes("0", "1")));
    }

    #[test]
    fn a_dataset_is_asked_in_order() {
        let prompts: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
        let workload = workload(Questions::Dataset { name: "d".into(), prompts });
        let asked: String = workload.scripts("0", "1", 7).iter().map(|s| s.questions[0].as_str()).collect();
        assert!("abcabcabcabc".contains(&asked), "{asked}");
    }

    #[test]
    fn a_dialogue_grows_by_answers_and_questions() {
        let script = Script {
            prefix: "p ".into(),
            questions: vec!["one".into(), "two".into()],
            exact_tokens: Some(7),
        };
        let mut dialogue = Dialogue::new(&script);
        assert_eq!(dialogue.exact(), Some(("p ", 7)));
        dialogue.go_on("yes".into(), &script.questions[1]);
        assert_eq!(dialogue.text(), "p one\nyes\ntwo");
        assert_eq!(dialogue.exact(), None);
        assert_eq!(
            dialogue.messages(),
            serde_json::json!([
                { "role": "user", "content": "p one" },
                { "role": "assistant", "content": "yes" },
                { "role": "user", "content": "two" },
            ])
        );
    }
}
