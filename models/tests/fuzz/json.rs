//! Spoils JSON by its structure.

use serde_json::{Value, json};

use crate::random::{Random, WORDS};

/// A number that JSON can hold.
pub(crate) fn number(random: &mut Random, near: &Value) -> Value {
    let near = near.as_u64().unwrap_or(1);
    match random.below(8) {
        0 => json!(0),
        1 => json!(-1),
        2 => json!(1e30),
        3 => json!(1u64 << 63),
        4 => json!(random.float()),
        5 => json!(random.integer(near) as i64),
        _ => json!(random.integer(near)),
    }
}

fn any(random: &mut Random) -> Value {
    match random.below(9) {
        0 => Value::Null,
        1 => json!(random.one_in(2)),
        2 => json!(random.pick(WORDS)),
        3 => json!([]),
        4 => json!({}),
        5 => json!([number(random, &Value::Null), number(random, &Value::Null)]),
        6 => {
            let depth = random.pick(&[2, 100, 120]);
            (0..depth).fold(json!(1), |inner, _| json!([inner]))
        }
        _ => number(random, &Value::Null),
    }
}

/// Changes one thing somewhere in `root`; says what.
pub(crate) fn spoil(random: &mut Random, root: &mut Value) -> String {
    let mut at = root;
    let mut path = String::new();
    // Down to a container whose child is changed.
    loop {
        let deep = |value: &Value| match value {
            Value::Object(map) => !map.is_empty(),
            Value::Array(items) => !items.is_empty(),
            _ => false,
        };
        let below: Vec<usize> = match &*at {
            Value::Object(map) => map.values().enumerate().filter(|(_, v)| deep(v)).map(|(i, _)| i).collect(),
            Value::Array(items) => {
                items.iter().enumerate().filter(|(_, v)| deep(v)).map(|(i, _)| i).collect()
            }
            _ => Vec::new(),
        };
        if below.is_empty() || random.one_in(3) {
            break;
        }
        let index = random.pick(&below);
        at = match at {
            Value::Object(map) => {
                let (key, value) = map.iter_mut().nth(index).expect("a child");
                path += &format!("/{key}");
                value
            }
            Value::Array(items) => {
                path += &format!("/{index}");
                &mut items[index]
            }
            other => {
                *other = Value::Null;
                return "nothing".into();
            }
        };
    }
    match at {
        Value::Object(map) if !map.is_empty() => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let (key, other) = (random.pick(&keys), random.pick(&keys));
            path += &format!("/{key}");
            match random.below(8) {
                0 => {
                    map.remove(&key);
                    format!("{path} removed")
                }
                1 => {
                    let value = map.remove(&key).unwrap_or_default();
                    let name = if random.one_in(2) { other } else { format!("{key}x") };
                    path += &format!(" renamed {name}");
                    map.insert(name, value);
                    path
                }
                2 => {
                    let value = map[&other].clone();
                    map.insert(key, value);
                    format!("{path} as {other}")
                }
                _ => change(random, map.get_mut(&key).expect("the key"), path),
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let index = random.below(items.len());
            path += &format!("/{index}");
            match random.below(6) {
                0 => drop(items.remove(index)),
                1 => items.push(items[index].clone()),
                2 => items.clear(),
                3 => items.resize(items.len() + (1 << random.below(10)), items[index].clone()),
                _ => return change(random, &mut items[index], path),
            }
            format!("{path}: now {} items", items.len())
        }
        other => change(random, other, path),
    }
}

fn change(random: &mut Random, value: &mut Value, path: String) -> String {
    let new = match &*value {
        Value::Bool(flag) if random.below(4) > 0 => json!(!flag),
        Value::Number(_) if random.below(4) > 0 => number(random, value),
        Value::String(_) if random.below(4) > 0 => json!(random.pick(WORDS)),
        _ => any(random),
    };
    *value = new;
    format!("{path} = {}", value.to_string().chars().take(60).collect::<String>())
}
