//! The daemon's API: HTTP/1.1 and JSON on a Unix socket.
//!
//! ```text
//! curl --unix-socket /run/bpfvs/bpfvs.sock http://bpfvs/v1/services
//! ```
//!
//! `GET /v1` lists the routes ([`ROUTES`]). Requests and answers are the types of [`crate::director::model`]. What a request
//! cannot have comes back as an HTTP status and `{"error": "sentence"}`; a command that the director refuses is an
//! answer, not an error: it stands in its place in the list of outcomes.
//!
//! Whoever may open the socket may do everything: it has the mode 0660, and its group is root's.

mod array;
pub mod client;
pub mod metrics;
pub mod server;

use serde::{Deserialize, Serialize};

use crate::director::model::Hook;

/// All routes: method, path, what it does.
pub const ROUTES: &[(&str, &str, &str)] = &[
    ("GET", "/v1", "this list"),
    ("POST", "/v1/commands", "does a list of commands in order; answers with one outcome for each"),
    ("GET", "/v1/services", "the virtual services with their real servers"),
    ("GET", "/v1/connections", "the connections"),
    ("GET", "/v1/mark-rules", "the mark rules"),
    ("GET", "/v1/local-addresses", "FULLNAT's local addresses, and how much of them is in use"),
    ("GET", "/v1/timeouts", "the timeouts"),
    ("GET", "/v1/sysctls", "IPVS's sysctls, and what each does here"),
    ("GET", "/v1/traffic", "counters and rates of all real servers together"),
    ("GET", "/v1/sync-daemons", "the synchronisation daemons, and what they have told or heard"),
    ("GET", "/v1/status", "how the daemon is"),
    ("GET", "/v1/reasons", "why packets were not forwarded"),
    ("GET", "/metrics", "all of that in numbers, for Prometheus"),
    ("POST", "/v1/attach", "attaches an interface: {\"interface\": name, \"hook\": \"auto\", \"xdp\" or \"tc\"}"),
    ("POST", "/v1/detach", "detaches an interface: {\"interface\": name}"),
    ("POST", "/v1/stop", "ends the daemon; {\"detach\": true} takes the datapath away, too"),
];

/// The query of `POST /v1/commands` if more commands follow at once: the answer does not wait until the state is written, nor
/// until the ways to real servers are known. Whoever sends it sends at the end a list, empty if need be, without it.
pub const MORE: &str = "more";

/// A route, as `GET /v1` lists it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Route {
    /// The HTTP method.
    pub method: String,
    /// The path.
    pub path: String,
    /// What it does.
    pub text: String,
}

/// The body of an error.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Failure {
    /// What failed, why, and what to do.
    pub error: String,
}

/// The body of `POST /v1/attach`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Attach {
    /// Name of the interface.
    pub interface: String,
    /// Where packets are met.
    #[serde(default)]
    pub hook: Hook,
}

/// The body of `POST /v1/detach`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Detach {
    /// Name of the interface.
    pub interface: String,
}

/// The body of `POST /v1/stop`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Stop {
    /// Take the datapath away: programs, maps, links, and the state file unless it was named.
    #[serde(default)]
    pub detach: bool,
}
