//! Whose web pages may call the server: `--cors-origins`.

use std::str::FromStr;

use serde::Deserialize;

/// An origin as browsers send it, or any.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Origin {
    Any,
    /// Scheme, host and, where it is not the scheme's own, port.
    Is(String),
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let text = text.to_ascii_lowercase();
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        let good = |host: &str| {
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?#@*,".contains(&byte))
        };
        if !host.is_some_and(good) {
            let problem =
                "is no origin: write one as browsers do, https://tools.example.com, with no path, or *";
            return Err(format!("`{text}` {problem}"));
        }
        Ok(Self::Is(text))
    }
}

impl TryFrom<String> for Origin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_send_them() {
        assert_eq!("*".parse(), Ok(Origin::Any));
        for text in ["https://tools.example.com", "http://localhost:3000", "http://[::1]:80"] {
            assert_eq!(text.parse(), Ok(Origin::Is(text.to_owned())));
        }
        assert_eq!(
            "HTTPS://Tools.Example.com".parse(),
            Ok(Origin::Is("https://tools.example.com".to_owned()))
        );
        for text in [
            "",
            "tools.example.com",
            "https://",
            "https://a/",
            "https://a/b",
            "ftp://a",
            "https://*.a",
            "https://a b",
        ] {
            assert!(text.parse::<Origin>().is_err(), "{text}");
        }
    }
}
