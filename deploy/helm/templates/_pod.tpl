{{/* Facts that all workloads share. */}}

{{- define "swarm.labels" -}}
app.kubernetes.io/part-of: swarm-weights
{{- end }}

{{- define "swarm.member" -}}
swarm-weights/member: "true"
{{- end }}

{{- define "swarm.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false # they are variables, which may look like settings
serviceAccountName: swarm-weights
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.user }}
  runAsGroup: {{ .Values.user }}
  fsGroup: {{ .Values.user }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "swarm.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{- define "swarm.env" -}}
{{- $settings := dict
  "SWARM_LISTEN" (printf "0.0.0.0:%v" .Values.port)
  "SWARM_PEERS" (printf "swarm-peers:%v" .Values.port)
  "SWARM_KEY_FILE" "/etc/swarm/swarm.key"
  "SWARM_METRICS_LISTEN" (printf "0.0.0.0:%v" .Values.metricsPort)
  "SWARM_MDNS" "false"
  "SWARM_CACHE" "/cache/swarm"
  "SWARM_CACHE_LIMIT_GB" (toString .Values.agent.cacheGB)
  "SWARM_DRAIN_TIMEOUT_S" "30"
  "HF_HOME" "/cache/huggingface"
  "HOME" "/cache"
  "USER" "swarm" -}}
{{- range $name, $value := merge (dict) .Values.settings $settings }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
- name: SWARM_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- end }}

{{/* Of a container that ends when it has failed: to look longer costs less than the pause before its next start. */}}
{{- define "swarm.patience" -}}
{{- if not (hasKey .Values.settings "SWARM_FIND_TIMEOUT_S") }}
- name: SWARM_FIND_TIMEOUT_S
  value: "30"
{{- end }}
{{- end }}

{{- define "swarm.envFrom" -}}
{{- with .Values.originSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "swarm.mounts" -}}
- name: key
  mountPath: /etc/swarm
  readOnly: true
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
{{- end }}

{{- define "swarm.volumes" -}}
- name: key
  secret:
    secretName: {{ .Values.key.secret }}
    defaultMode: 0440
- name: tmp
  emptyDir: {}
{{- end }}

{{- define "swarm.ports" -}}
- name: swarm
  containerPort: {{ .Values.port }}
- name: swarm-gossip
  containerPort: {{ .Values.port }}
  protocol: UDP
- name: metrics
  containerPort: {{ .Values.metricsPort }}
{{- end }}

{{- define "swarm.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 1
  failureThreshold: 120
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
{{- end }}

{{/* Probes of a server at its port `http`. A server of a large model compiles for minutes before it answers. */}}
{{- define "swarm.serverProbes" -}}
startupProbe:
  httpGet: {path: {{ . }}, port: http}
  periodSeconds: 1
  failureThreshold: 1800
readinessProbe:
  httpGet: {path: {{ . }}, port: http}
  periodSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: {{ . }}, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
lifecycle:
  preStop:
    sleep: {seconds: 5} # meanwhile Services stop sending requests here
{{- end }}

{{- define "swarm.revision" -}}
{{- with .Values.revision }}
- --revision
- {{ . | quote }}
{{- end }}
{{- end }}
